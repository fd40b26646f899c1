"""What an adapter is held against: the base model's modules and sizes, in plain types.

Made once by the engine from what the model declares, sent to the loader process, asked by `checkpoint`. Holds no
tensors; `weights_dir` is where the base model's own can be found.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from multilora.lora.sites import (
    EMBED,
    HEAD,
    LAYERS,
    MODEL_LEVEL,
    SCORE,
    TABLES,
    LoraSite,
    LoraSlice,
    NormModule,
    module_path,
    module_shapes,
    num_layers,
)

if TYPE_CHECKING:  # it would bring transformers into the loader process
    from multilora.models.base import CausalLM


class Place(NamedTuple):
    """One module of the base model. layer: MODEL_LEVEL for embed_tokens, lm_head and the final norm."""

    layer: int
    module: str


SCORE_PLACE = Place(MODEL_LEVEL, SCORE)


@dataclass(frozen=True)
class ExpertPlace:
    """What adapters may call a module of experts: a part of a site of experts.

    whole: that site's one module; expert: None: all of them; offset, width: which columns of its outputs; parts: the
    modules that make up these columns in each expert, empty: it is not known which column is whose; starts: the first
    column of each.
    """

    whole: Place
    experts: int
    expert: int | None
    in_features: int
    out_features: int
    offset: int
    width: int
    parts: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class BaseModel:
    """One base model as adapters see it. Module names are the last component of PEFT's, where that is unique:
    "q_proj", "q_norm". layers: the path of the list of decoder layers; older_names: see `CausalLM`.
    """

    sites: tuple[LoraSite, ...]
    norms: tuple[NormModule, ...]
    vocab_size: int
    hidden_size: int
    tie_word_embeddings: bool
    weights_dir: str | None = None  # a local directory with the checkpoint; None: there is none
    layers: str = LAYERS
    older_names: tuple[tuple[str, str], ...] = ()
    without_adapters: tuple[str, ...] = ()  # paths of modules that adapters cannot change

    @classmethod
    def of(cls, model: "CausalLM", weights_dir: str | None) -> "BaseModel":
        """The model may be on the meta device; only its config and its declarations are read."""
        config = model.config
        sizes = config.vocab_size, config.hidden_size, config.tie_word_embeddings
        return cls(
            model.lora_sites(),
            model.norms(),
            *sizes,
            weights_dir,
            model.layers_path,
            tuple(model.older_names),
            model.without_adapters(),
        )

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """LoRA target (embed_tokens and lm_head too) → (in_features, out_features)."""
        return module_shapes(self.sites)

    @cached_property
    def norm_sizes(self) -> dict[str, int]:
        """Norm → the size of its weight."""
        return {norm.module: norm.size for norm in self.norms}

    @cached_property
    def biased(self) -> frozenset[str]:
        """The linear modules that have a bias."""
        return frozenset(s.module for site in self.sites for s in site.slices if s.bias)

    @cached_property
    def num_layers(self) -> int:
        """Decoder layers."""
        return num_layers(self.sites)

    @cached_property
    def order(self) -> dict[str, int]:
        """LoRA target → its position, as the sites have it."""
        return {module: i for i, module in enumerate(self.shapes)}

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every module that has parameters, by its name inside the base model: "model.layers.0.mlp.up_proj"; and the
        classification head, which most base models leave to adapters."""
        modules: list[tuple[int, LoraSlice | NormModule]] = [(n.layer, n) for n in self.norms]
        modules += [(site.layer, s) for site in self.sites for s in site.slices]
        found = {
            module_path(layer, m.parent, m.attribute or m.module, self.layers): Place(layer, m.module)
            for layer, m in modules
        }
        return found | {SCORE: SCORE_PLACE}

    @property
    def inner(self) -> str:
        """What the names of modules begin with inside the whole model, and do not inside the decoder: "model."."""
        return self.layers.partition(".")[0] + "."

    def place_of(self, name: str) -> Place | None:
        """The module with this name inside the whole model or inside its decoder; None: there is none."""
        found = self.places.get(name) or self.places.get(self.inner + name)
        if found is None and self._has_experts:
            for old, new in self.older_names:
                name = f"{name}.".replace(old, new)[:-1]
            found = self.places.get(name) or self.places.get(self.inner + name)
            found = found or self._expert_paths.get(name) or self._expert_paths.get(self.inner + name)
        return found

    def takes_no_adapters(self, name: str) -> bool:
        """Whether the module of this name is known to be, or to lie in, one that adapters cannot change."""
        paths = (name, self.inner + name)
        return any(path == other or path.startswith(f"{other}.") for other in self.without_adapters for path in paths)

    @cached_property
    def _has_experts(self) -> bool:
        return any(site.experts for site in self.sites)

    def is_of_experts(self, place: Place) -> bool:
        """Whether it is a module of one expert, or of all."""
        return place in self._expert_places

    def expert_place(self, place: Place) -> ExpertPlace:
        """Which part of which site of experts it is. KeyError if it is none."""
        return self._expert_places[place]

    def parameters_of(self, name: str) -> tuple[str, ...]:
        """The parameters of a layer's experts, by their path inside the whole model or its decoder."""
        for old, new in self.older_names:
            name = f"{name}.".replace(old, new)[:-1]
        return self.expert_parameters.get(name) or self.expert_parameters.get(self.inner + name, ())

    @cached_property
    def expert_parameters(self) -> dict[str, tuple[str, ...]]:
        """The path of a layer's experts, where PEFT wraps their parameters → the parameters, in their order there."""
        found: dict[str, tuple[str, ...]] = {}
        for site in self.sites:
            if site.experts:
                [part] = site.slices
                path = module_path(site.layer, "", part.parent, self.layers)
                found[path] = (*found.get(path, ()), part.attribute)
        return found

    @cached_property
    def _expert_paths(self) -> dict[str, Place]:
        """Every module of experts but the sites' own, by its path; its place has a name that no site has."""
        return {
            module_path(place.layer, parent, leaf, self.layers): place
            for place, (parent, leaf, _) in self._expert_modules.items()
        }

    @cached_property
    def _expert_places(self) -> dict[Place, ExpertPlace]:
        return {place: found for place, (_, _, found) in self._expert_modules.items()}

    @cached_property
    def _expert_modules(self) -> dict[Place, tuple[str, str, ExpertPlace]]:
        """Place → the path of its parent inside the layer, its last component, and what it is."""
        found: dict[Place, tuple[str, str, ExpertPlace]] = {}
        for site in self.sites:
            if site.experts:
                found |= _modules_of_experts(site)
        return found

    def is_table(self, name: str) -> bool:
        """Whether the module of this name is the token embedding or the head."""
        place = self.place_of(name)
        return (place.module if place else name.rpartition(".")[2]) in TABLES

    @cached_property
    def table_paths(self) -> dict[str, str]:
        """embed_tokens, lm_head → their names inside the base model."""
        found = {place.module: path for path, place in self.places.items() if place.module in TABLES}
        return {EMBED: self.inner + EMBED, HEAD: HEAD} | found

    @cached_property
    def transposed(self) -> frozenset[str]:
        """The linear modules whose weight PEFT saves as [in, out]."""
        return frozenset(s.module for site in self.sites for s in site.slices if s.transposed)

    @cached_property
    def before_kv(self) -> dict[Place, bool]:
        """Whether changing the module changes keys or values of its own layer (see `LoraSlice`)."""
        slices = {Place(site.layer, s.module): s.before_kv for site in self.sites for s in site.slices}
        norms = {Place(norm.layer, norm.module): norm.before_kv for norm in self.norms}
        return slices | norms | {SCORE_PLACE: False}

    @cached_property
    def paths(self) -> dict[Place, str]:
        """`places` the other way round."""
        return {place: path for path, place in self.places.items()}


def _modules_of_experts(site: LoraSite) -> dict[Place, tuple[str, str, ExpertPlace]]:
    """The site's own module, its parts stacked, and its parts of each expert."""
    [whole] = site.slices
    count = max(1, len(whole.parts))
    width = whole.out_features // count
    starts = tuple(i * width for i in range(count))
    place = Place(site.layer, whole.module)
    sizes = site.in_features, whole.out_features
    found = {}
    for expert in (None, *range(site.experts)):
        parent = whole.parent if expert is None else f"{whole.parent}.{expert}"
        for start, part in zip(starts, whole.parts, strict=False):
            name = "experts" if expert is None else f"experts.{expert}"
            own = ExpertPlace(place, site.experts, expert, *sizes, start, width, (part,), (start,))
            found[Place(site.layer, f"{name}.{part}")] = parent, part, own
    own = ExpertPlace(place, site.experts, None, *sizes, 0, whole.out_features, whole.parts, starts)
    found[place] = whole.parent, whole.attribute, own
    return found
