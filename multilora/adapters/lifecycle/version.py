"""One adapter version as the engine knows it: its state, where its bytes are, and why they must stay there.

    REGISTERED ─► QUEUED ─► FETCHING ─► ON_HOST ─► LOADING ─► RESIDENT        unload: ─► GONE, and
        ▲           ▲           │         │ ▲                    │              FETCHING, LOADING ─► DRAINING ─► GONE
        │           └─ FAILED ◄─┘         │ └──── evicted ───────┤
        └──────── evicted ────────────────┴───────── evicted ────┘

`TRANSITIONS` is the whole table; `move` is the only way from one state to another and asserts it. The host tier is a
cache of its own, so a resident adapter may or may not have its bytes on the host as well: `PLACES` says what each
state has where, and `move` asserts that too. Eviction is one move and no state, as nothing waits for it: the books
change at once, and the fence of the page pool keeps other streams off the pages until the running step has finished.
"""

from dataclasses import dataclass, field
from enum import Enum

from multilora.adapters.host.mapping import HostEntry
from multilora.lora.panels import PanelLayout, ScaleShift
from multilora.lora.sites import EMBED, HEAD, SCORE


class State(Enum):
    """Where an adapter version is on its way."""

    REGISTERED = "registered"  # known; its bytes are on disk only
    QUEUED = "queued"  # waits until the host tier can take it
    FETCHING = "fetching"  # the loader reads, checks and packs it
    FAILED = "failed"  # could not be brought back; it may be asked for again
    ON_HOST = "on_host"  # packed in host memory
    LOADING = "loading"  # being copied to the device
    RESIDENT = "resident"  # on the device: requests can run on it
    DRAINING = "draining"  # unloaded, while the loader or a copy still works on it
    GONE = "gone"


TRANSITIONS: dict[tuple[State, State], str] = {
    (State.REGISTERED, State.QUEUED): "loaded, or asked for",
    (State.QUEUED, State.FETCHING): "host tier has room",
    (State.FETCHING, State.ON_HOST): "packed",
    (State.FETCHING, State.FAILED): "unreadable, or changed",
    (State.FAILED, State.QUEUED): "asked for",
    (State.ON_HOST, State.LOADING): "copy started",
    (State.ON_HOST, State.REGISTERED): "evicted from host",
    (State.LOADING, State.RESIDENT): "copy done",
    (State.RESIDENT, State.ON_HOST): "evicted",
    (State.RESIDENT, State.REGISTERED): "evicted, host bytes too before",
    (State.FETCHING, State.DRAINING): "unloaded",
    (State.LOADING, State.DRAINING): "unloaded",
    (State.DRAINING, State.GONE): "loader or copy done",
    (State.FETCHING, State.GONE): "first load failed",
    (State.QUEUED, State.GONE): "unloaded, or first load failed",
    (State.REGISTERED, State.GONE): "unloaded",
    (State.FAILED, State.GONE): "unloaded",
    (State.ON_HOST, State.GONE): "unloaded",
    (State.RESIDENT, State.GONE): "unloaded",
}

PLACES: dict[State, tuple[set[bool], set[bool]]] = {
    State.ON_HOST: ({True}, {False}),
    State.LOADING: ({True}, {True}),
    State.RESIDENT: ({True, False}, {True}),
    State.DRAINING: ({False}, {True, False}),
}
"""state → whether it has (bytes on the host, pages on the device); those not listed have neither."""


@dataclass
class DeviceEntry:
    """An adapter's share of the device tier. Written by `DeviceTier` only."""

    slot: int  # in the LoRA table
    pages: list[int]
    loaded_at: int  # in ticks of the tier, as `last_used`
    last_used: int
    score: float
    uses: int = 0


@dataclass(eq=False)
class AdapterVersion:
    """One version. What the first fetch finds out is known from `layout` on: `rank` to `leaves_kv`.

    changes: where it notes that its statistics have changed, shared by all versions of a store.
    """

    version: int
    path: str
    pinned: bool
    changes: "dict[int, AdapterVersion]" = field(default_factory=dict, repr=False)
    state: State = State.REGISTERED
    host: HostEntry | None = None
    device: DeviceEntry | None = None

    refs: int = 0  # running requests that hold its slot
    waiting: int = 0  # requests in the queue
    queued_demand: int = 0  # those of them that may start soon: it is evicted after others
    claimed: bool = False  # asked for in this plan: it stays where it is until the next

    layout: PanelLayout | None = None
    rank: int = 0
    target_modules: list[str] = field(default_factory=list)
    fingerprint: str = ""
    invocation_tokens: tuple[int, ...] | None = None  # see Adapter
    leaves_kv: bool = False  # its keys and values are the base model's

    loads: int = 0
    evictions: int = 0
    fetches: int = 0
    hits: int = 0  # requests that found it resident
    misses: int = 0
    load_seconds: float = 0.0
    asked_at: float | None = None  # since when a request, or a pin, has waited for it
    reported: bool = False  # `take_changes` has returned it

    # ------------------------------------------------------------------ states

    def move(self, state: State) -> None:
        """Go to another state, after `host` and `device` have been set to what it has."""
        assert (self.state, state) in TRANSITIONS, f"version {self.version}: {self.state} → {state}"
        self.state = state
        self.check()
        self.changed()

    def check(self) -> None:
        """Raise AssertionError if its bytes are not where its state says, or requests run on what is not resident."""
        on_host, on_device = PLACES.get(self.state, ({False}, {False}))
        assert (self.host is not None) in on_host, f"version {self.version}: {self.state}, host {self.host}"
        assert (self.device is not None) in on_device, f"version {self.version}: {self.state}, device {self.device}"
        assert self.refs == 0 or self.state is State.RESIDENT, f"version {self.version}: {self.state}, in use"

    @property
    def known(self) -> bool:
        """Its first load has ended well, and it has not been unloaded since."""
        return self.layout is not None and self.state not in (State.DRAINING, State.GONE)

    def keep_reason(self) -> str:
        """Why it must stay in the tier that its state names. Empty: it may be evicted."""
        if self.pinned:
            return "pinned"
        if self.state is State.LOADING:
            return "being copied"
        if self.refs:
            return "in use"
        return "asked for in this plan" if self.claimed else ""

    @property
    def device_evictable(self) -> bool:
        return self.state is State.RESIDENT and not self.keep_reason()

    @property
    def host_evictable(self) -> bool:
        """Its bytes on the host may go. A resident adapter does not need them."""
        return self.host is not None and not (self.pinned if self.state is State.RESIDENT else self.keep_reason())

    @property
    def slot(self) -> int:
        """Its slot in the LoRA table, while it is resident."""
        assert self.device is not None and self.state is State.RESIDENT
        return self.device.slot

    # ------------------------------------------------------------------ statistics

    def changed(self) -> None:
        """Its statistics are not what they were."""
        self.changes[self.version] = self

    def count_request(self) -> None:
        """A request asks for it for the first time: a hit if it is resident already."""
        hit = self.state is State.RESIDENT
        self.hits += hit
        self.misses += not hit
        self.changed()

    def count_waiting(self, change: int) -> None:
        """`change` more requests for it are in the queue than before."""
        self.waiting += change
        self.changed()

    # ------------------------------------------------------------------ what its files brought

    @property
    def pages(self) -> int:
        """Pages of the arena that it takes; 0 before its first fetch."""
        return self.layout.num_pages if self.layout else 0

    @property
    def vocab_size(self) -> int | None:
        """How many tokens it has, where it brings its own head; None: as many as the base model."""
        full_weights = self.layout.shape.full_weights if self.layout else ()
        return next((w.rows for w in full_weights if w.module == HEAD and not w.token_ids), None)

    @property
    def num_labels(self) -> int:
        """How many labels its own classification head has; 0: it has none."""
        full_weights = self.layout.shape.full_weights if self.layout else ()
        return next((w.rows for w in full_weights if w.module == SCORE), 0)

    @property
    def trains_tokens(self) -> bool:
        """Whether it changes token embeddings: it may have tokens that the base model's tokenizer does not know."""
        return EMBED in self.target_modules

    @property
    def not_composable_reason(self) -> str:
        """Why it cannot be one of several adapters of a request, or act with a weight. Empty: it can."""
        if self.invocation_tokens is not None:
            return "it is an activated LoRA"
        assert self.layout is not None
        shape = self.layout.shape
        kinds = {ScaleShift(kind) for slices in shape.scale_shift for kind in slices}
        if any(ScaleShift.DORA in kind for kind in kinds):
            return "it uses DoRA"
        if shape.scale_shift:
            return "it has trained biases"
        if shape.full_weights:
            return f"it replaces weights of {shape.full_weights[0].module}"
        return ""
