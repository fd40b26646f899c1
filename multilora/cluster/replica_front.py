"""The front of one replica: that of a server, whose names are the cluster's."""

from collections.abc import Sequence
from typing import Any

from multilora.cluster.local_copies import LocalCopies
from multilora.cluster.replica_registry import ReplicaRegistry
from multilora.cluster.shared_records import SharedRecords
from multilora.cluster.shared_registry import LEASE_SECONDS
from multilora.config import Config
from multilora.front.adapter_manager import AdapterManager
from multilora.front.effects import Steps
from multilora.front.fetcher import Fetcher
from multilora.front.front import Front
from multilora.front.observer import Observer
from multilora.front.registry import AdapterRegistry
from multilora.front.request_front import AdapterHolder


class ReplicaManager(AdapterManager):
    """An AdapterManager whose compositions may have parts that are not loaded here. copies: what brings them."""

    copies: LocalCopies | None = None

    def compose(
        self,
        name: str,
        parts: Sequence[Any],
        *,
        pinned: bool | None = None,
        replace: bool = False,
        weight_version: str | None = None,
    ) -> Steps[None]:
        """See `AdapterManager`."""
        assert self.copies is not None
        yield from self.copies.hold(self._registry.names_of(None, list(parts)))
        yield from super().compose(name, parts, pinned=pinned, replace=replace, weight_version=weight_version)


class ReplicaFront(Front):
    """`records` must be SharedRecords."""

    registry_type = ReplicaRegistry
    manager_type = ReplicaManager
    copies: LocalCopies

    def _make_resolver(
        self, config: Config, registry: AdapterRegistry, fetcher: Fetcher, observer: Observer
    ) -> AdapterHolder:
        del fetcher, observer
        assert isinstance(registry, ReplicaRegistry) and isinstance(self.adapters, ReplicaManager)
        assert isinstance(self.records, SharedRecords)
        registry.table = self.records.table
        self.copies = LocalCopies(registry, self.adapters, config.lora_load_timeout, LEASE_SECONDS)
        self.copies.records = self.records
        self.records.replaces = registry.replaces
        self.adapters.copies = self.copies
        return self.copies
