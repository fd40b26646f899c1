"""What the engine knows of one registered adapter version, wherever its bytes are. Written by `store.py` only."""

from dataclasses import dataclass, field

from multilora.lora.panels import PanelLayout, ScaleShift
from multilora.lora.sites import EMBED, HEAD


@dataclass
class Record:
    """One registered version. `layout` is known once it has been fetched for the first time."""

    version: int
    path: str
    pinned: bool
    layout: PanelLayout | None = None
    rank: int = 0
    target_modules: list[str] = field(default_factory=list)
    fingerprint: str = ""
    invocation_tokens: tuple[int, ...] | None = None  # see Adapter
    leaves_kv: bool = False  # its keys and values are the base model's
    fetching: bool = False
    loads: int = 0
    evictions: int = 0
    fetches: int = 0
    hits: int = 0  # requests that found it resident
    misses: int = 0
    load_seconds: float = 0.0
    asked_at: float | None = None  # since when somebody has waited for it

    @property
    def pages(self) -> int:
        return self.layout.num_pages if self.layout else 0

    @property
    def vocab_size(self) -> int | None:
        """How many tokens it has, where it brings its own head; None: as many as the base model."""
        full_weights = self.layout.shape.full_weights if self.layout else ()
        return next((w.rows for w in full_weights if w.module == HEAD and not w.token_ids), None)

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
