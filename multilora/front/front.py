"""What there is once per server beside its requests: the registry and who changes it, quotas, pauses.

`Front.adapters` loads and unloads adapters; `Front.resolver` loads those that are asked for by a name that is not
loaded. The road of a request is `request_front.py`'s.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from multilora.adapters.sources.spool import Spool
from multilora.config import Config
from multilora.front.access import Limits, Tenant
from multilora.front.adapter_manager import AdapterManager
from multilora.front.admission import LocalAdmission
from multilora.front.effects import Steps
from multilora.front.engine_link import EngineLink
from multilora.front.fetcher import Fetcher
from multilora.front.generation import Sample
from multilora.front.observer import Observer
from multilora.front.pause_manager import PauseManager
from multilora.front.quotas import Quotas
from multilora.front.records import Records
from multilora.front.registry import AdapterRegistry
from multilora.front.request_front import AdapterHolder, RequestFront
from multilora.front.resolver import Resolver
from multilora.front.restoring import load_at_start
from multilora.front.tokenizer import Tokenizer
from multilora.front.vocabulary import Vocabularies


class Front(RequestFront):
    """The front of one server.

    tokenizer: None: token ids only. spool: where adapters are kept that do not come from a directory or the hub.
    observer: who counts requests; None: nobody. records: what is written down of adapters; None: nothing. Its heirs
    may have another registry, manager or resolver.
    """

    engine: EngineLink
    admission: LocalAdmission
    registry_type: ClassVar[type[AdapterRegistry]] = AdapterRegistry
    manager_type: ClassVar[type[AdapterManager]] = AdapterManager

    def __init__(
        self,
        config: Config,
        engine: EngineLink,
        tokenizer: Tokenizer | None,
        spool: Spool,
        observer: Observer | None = None,
        records: Records | None = None,
    ):
        observer = observer or Observer()
        self.quotas = Quotas()
        self.records = records or Records()
        self.pauses = PauseManager()
        registry = self.registry_type(
            config.model_name, config.enable_lora, config.max_loaded_loras, config.max_loras_per_tenant
        )
        vocabularies = Vocabularies(tokenizer, engine.ready, registry, spool.admit(config).lora_root)
        fetcher = Fetcher(config, spool)
        self.adapters = self.manager_type(
            registry, vocabularies, spool, fetcher, observer, self.records, config.lora_load_timeout
        )
        resolver = self._make_resolver(config, registry, fetcher, observer)
        admission = LocalAdmission(config, engine, registry, self.quotas)
        super().__init__(config, engine, registry, vocabularies, admission, resolver, observer)

    def _make_resolver(
        self, config: Config, registry: AdapterRegistry, fetcher: Fetcher, observer: Observer
    ) -> AdapterHolder:
        return Resolver(config, registry, self.adapters, fetcher, observer)

    def load_at_start(self) -> Steps[None]:
        """Load what is there from the start: --lora-paths, and what the records have. See `restoring.py`."""
        return load_at_start(self.adapters, self.registry, self.records, self.config.lora_paths)

    def abort(self, rid: str | None, message: str = "aborted") -> int:
        """Abort the request `rid`, all of its samples; None: every request. They end with `abort`. Returns how many
        requests that are. Only the requests of the caller's tenant can be named; every one is an admin's to abort.

        Raises Forbidden.
        """
        return self.admission.abort(rid, message)

    def stop(self) -> None:
        """The server waits no longer: see `LocalAdmission.stop`."""
        self.admission.stop()

    def use_keys(self, tenants: Mapping[str, Tenant], adapters: Sequence[tuple[str, Limits]]) -> None:
        """There are these tenants from now on; adapters: see `Quotas`."""
        self.registry.tenants = tenants
        self.quotas.adapters = adapters

    @property
    def in_flight(self) -> int:
        """How many samples are open: checked, waiting or running."""
        return self.admission.in_flight

    def open_samples(self) -> Iterator[tuple[str, bool]]:
        """Each open sample's tenant, and whether it has any output yet."""
        return self.admission.open_samples()

    def waiting_tokens(self) -> int:
        """Prompt tokens of the samples that have no output yet."""
        return self.admission.waiting_tokens()

    def _end(self, sample: Sample) -> None:
        super()._end(sample)
        if sample.ticket.submitted:
            self.forget_unloaded(name for name, _ in sample.job.adapters)

    def forget_unloaded(self, names: Iterable[str]) -> None:
        """Those of an ended sample: some were unloaded while the client read what was there."""
        for name in names:
            if self.registry.current(name) is None:
                self.observer.forget(name)
