"""The adapter store of an engine without LoRA: no version is known, nothing is on its way, all else is refused.

Engine and scheduler call it like the real one, so none of them asks whether LoRA is on.
"""

from typing import NoReturn

from multilora.adapters.lifecycle.fetch_queue import LoadTraces
from multilora.adapters.lifecycle.store import AdapterStore, Loaded, Lost
from multilora.adapters.lifecycle.version import AdapterVersion
from multilora.errors import LoraNotEnabled


class DisabledStore:
    busy = working = copying = False
    pinned_count = pinned_pages = host_page_bytes = 0
    traces: LoadTraces | None = None

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:  # noqa: ARG002 - part of the contract
        """Raise LoraNotEnabled."""
        raise LoraNotEnabled("LoRA is not enabled: start with --enable-lora")

    load = unload = set_limits = get = request_load = claim_on_device = unclaim = _refuse

    @property
    def device(self) -> NoReturn:
        self._refuse()

    def poll_loads(self, fence: int) -> list[Loaded | Lost]:  # noqa: ARG002 - part of the contract
        return []

    def known(self, version: int) -> bool:  # noqa: ARG002 - part of the contract
        return False

    def loaded(self) -> list[AdapterVersion]:
        return []

    def take_changes(self) -> tuple[list[AdapterVersion], list[int]]:
        return [], []

    def slots(self) -> tuple[int, int]:
        return 0, 0

    def fileno(self) -> None:
        return None

    def begin_plan(self) -> None: ...

    def suspend_copies(self, fence: int) -> None: ...

    def resume_copies(self) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


AnyStore = AdapterStore | DisabledStore
