"""The modules of a base model that adapters can change, as the layers that compute them declare them.

A site is one (possibly merged) linear layer: `qkv_proj` and `gate_up_proj` read their input once, so their slices
share one shrink. Layers declare their sites and norms while a model is built; every other part of the package takes
module names, widths and paths from these declarations.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

MODEL_LEVEL = -1
"""The layer of modules that belong to no decoder layer: the token embedding, the final norm, the head."""

EMBED, HEAD = "embed_tokens", "lm_head"
TABLES = (EMBED, HEAD)
"""The modules whose weight is [vocab, hidden]; tied models use the embedding's for both."""

SCORE = "score"
"""The classification head, which is no LoRA target: adapters replace it entirely. Most base models have none."""

LAYERS = "model.layers"
"""The path of the list of decoder layers, as transformers, PEFT and checkpoints name it."""


class Shard(StrEnum):
    """How tensor parallelism divides the weight of a module among ranks."""

    COLUMN = "column"  # by output features, in whole units
    KV = "kv"  # the same, and where there are fewer units than ranks, several ranks hold the same one
    ROW = "row"  # by input features; the outputs of the ranks are summed
    VOCAB = "vocab"  # by rows of a table
    EXPERT = "expert"  # by experts of a mixture; the outputs of the ranks are summed
    REPLICATED = "replicated"  # every rank holds all of it


@dataclass(frozen=True)
class LoraSlice:
    """One LoRA target inside a site: columns [offset, offset + out_features) of the site's output.

    parent: path of the module that holds it, inside its decoder layer ("self_attn") or, at model level, inside the
    whole model ("model"); "": it is held directly.
    before_kv: its output is part of what the keys or values of its own decoder layer are computed from, so that
    changing it changes them (at model level: those of the first layer). True is the safe answer.
    bias: the base model has one. unit: so many outputs belong together, such as those of a head: ranks divide whole
    units. blocks: so many blocks of the same width lie behind each other in its outputs, such as gate and up of
    experts: ranks hold the same part of each. parts: at a site of experts, the modules that each expert has in its
    place, their outputs side by side; empty: they may be interleaved.
    transposed: checkpoints and PEFT's modules_to_save hold the weight as [in, out] (transformers' Conv1D).
    """

    module: (
        str  # what it is called among the targets: PEFT's name, the last component of the path, where that is unique
    )
    offset: int
    out_features: int
    parent: str = ""
    before_kv: bool = True
    shard: Shard = Shard.REPLICATED
    bias: bool = False
    unit: int = 1
    parts: tuple[str, ...] = ()
    attribute: str = ""  # the last component of its path, where that is another than `module`
    transposed: bool = False
    blocks: int = 1

    @property
    def columns(self) -> slice:
        """Its columns of the site's output, which are the rows of the merged weight."""
        return slice(self.offset, self.offset + self.out_features)


@dataclass(frozen=True)
class LoraSite:
    """One linear layer that can carry LoRA. The slices cover its output without gaps.

    experts: so many experts of a mixture have a layer of this shape each, and each row is one expert's; 0: it is no
    layer of experts. An expert is one more coordinate of the site, of its weights and of its adapters'. Such a site
    has one slice.
    """

    index: int  # position in the model's list of sites
    layer: int
    name: str  # of the merged layer: "qkv_proj", "o_proj"
    in_features: int
    slices: tuple[LoraSlice, ...]
    experts: int = 0

    @property
    def copies(self) -> int:
        """How many weights there are at this site."""
        return max(1, self.experts)

    @property
    def out_features(self) -> int:
        return sum(s.out_features for s in self.slices)

    @property
    def bias(self) -> bool:
        return any(s.bias for s in self.slices)


@dataclass(frozen=True)
class NormModule:
    """A norm that adapters can replace (modules_to_save). parent, before_kv, attribute: see `LoraSlice`."""

    layer: int
    module: str
    parent: str
    size: int
    before_kv: bool
    attribute: str = ""


class DeclaredModules:
    """Collects the declarations while a model is built, and numbers the sites in the order of their declaration."""

    def __init__(self) -> None:
        self.sites: list[LoraSite] = []
        self.norms: list[NormModule] = []

    def site(self, layer: int, name: str, in_features: int, *targets: LoraSlice, experts: int = 0) -> LoraSite:
        """A linear layer that computes these targets, their outputs side by side in this order."""
        slices: list[LoraSlice] = []
        offset = 0
        for target in targets:
            slices.append(replace(target, offset=offset))
            offset += target.out_features
        self.sites.append(LoraSite(len(self.sites), layer, name, in_features, tuple(slices), experts))
        return self.sites[-1]

    def norm(self, layer: int, path: str, size: int, *, before_kv: bool) -> NormModule:
        """path: inside the decoder layer, or the model at MODEL_LEVEL."""
        parent, _, module = path.rpartition(".")
        self.norms.append(NormModule(layer, module, parent, size, before_kv))
        return self.norms[-1]


def target(
    path: str,
    out_features: int,
    *,
    before_kv: bool,
    shard: Shard,
    bias: bool = False,
    unit: int = 1,
    prefix: str = "",
    parts: tuple[str, ...] = (),
    blocks: int = 1,
) -> LoraSlice:
    """The declaration of a LoRA target, for `DeclaredModules.site`. path: as `DeclaredModules.norm` has it.

    prefix: with it, the last component of the path names the target where others of its layer have the same.
    """
    parent, _, leaf = path.rpartition(".")
    module, attribute = (f"{prefix}.{leaf}", leaf) if prefix else (leaf, "")
    return LoraSlice(module, 0, out_features, parent, before_kv, shard, bias, unit, parts, attribute, blocks=blocks)


def module_path(layer: int, parent: str, module: str, layers: str = LAYERS) -> str:
    """The name of a module inside the base model: "model.layers.3.self_attn.q_proj", "model.norm"."""
    parts = (parent, module) if layer == MODEL_LEVEL else (layers, str(layer), parent, module)
    return ".".join(part for part in parts if part)


def module_shapes(sites: tuple[LoraSite, ...]) -> dict[str, tuple[int, int]]:
    """PEFT module name → (in_features, out_features), the same in every layer."""
    return {s.module: (site.in_features, s.out_features) for site in sites for s in site.slices}


def num_layers(sites: tuple[LoraSite, ...]) -> int:
    return 1 + max((site.layer for site in sites), default=-1)
