"""One version of one adapter as the registry keeps it, and what a request holds of it while it runs.

Records without behaviour; `AdapterRegistry` is their only writer. Called by `registry.py`, `resolver.py` and
`generation.py`.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from multilora.engine.messages import AdapterInfo
from multilora.front.adapter_spec import AdapterSpec
from multilora.front.versions import UNLABELLED, VersionLabel
from multilora.params import Composition


class RefState(enum.Enum):
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    REPLACED = "replaced"
    GONE = "gone"


@dataclass
class AdapterRef:
    """Reference to one version of one adapter, or a named composition. `num_requests`: how many requests hold it."""

    name: str
    path: str
    version: int
    pinned: bool
    weight_version: str | None = None  # the caller's label; None: the server's
    state: RefState = RefState.LOADING
    info: AdapterInfo | None = None  # once loaded
    parts: AdapterSpec = ()  # of a composition: plain adapters, by name
    num_requests: int = 0
    idle_callbacks: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """What one request runs on until it is released: `composition` for the engine, `label` for the client."""

    composition: Composition = ()
    refs: tuple[AdapterRef, ...] = ()
    label: VersionLabel = UNLABELLED
