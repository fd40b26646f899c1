"""The places in a model where LoRA can act, and how wide they are on this rank.

A site is one (possibly merged) linear layer: `qkv_proj` and `gate_up_proj` read their input once, so their
slices share one shrink. Models declare their sites; everything else takes them from here.
"""

from dataclasses import dataclass

MODEL_LEVEL = -1
"""The layer of sites that belong to no decoder layer: embed_tokens, lm_head."""


@dataclass(frozen=True)
class LoraSlice:
    """One PEFT target module inside a site: columns [offset, offset + out_features) of the site's output."""

    module: str  # PEFT's name: "q_proj"
    offset: int
    out_features: int


@dataclass(frozen=True)
class LoraSite:
    """One linear layer that can carry LoRA."""

    index: int  # position in the model's list of sites
    layer: int
    name: str  # "qkv_proj", "o_proj", "gate_up_proj", "down_proj"
    in_features: int
    slices: tuple[LoraSlice, ...]

    @property
    def out_features(self) -> int:
        return sum(s.out_features for s in self.slices)


def module_shapes(sites: tuple[LoraSite, ...]) -> dict[str, tuple[int, int]]:
    """PEFT module name → (in_features, out_features), the same in every layer."""
    return {s.module: (site.in_features, s.out_features) for site in sites for s in site.slices}


def num_layers(sites: tuple[LoraSite, ...]) -> int:
    return 1 + max((site.layer for site in sites), default=-1)
