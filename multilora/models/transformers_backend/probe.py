"""Runs a causal LM of transformers once on the meta device, and notes everything that serving it takes.

Nothing is computed and no weight exists: what is found are shapes, order and arguments of attention. A model whose
forward pass looks at numbers, attends in another way than through transformers' attention interface, or mixes tokens
elsewhere cannot be served from pages, and is refused here, by name. Called by `config.py`.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from multilora.errors import ModelUnsupported
from multilora.models.transformers_backend.common_parts import BROKEN, Rotation, takes_whole_heads, with_rotation
from multilora.models.transformers_backend.masks import MarkedMask, MaskMeaning, marked_mask
from multilora.models.transformers_backend.tree import Tree
from multilora.models.transformers_backend.tree_experts import DOWN, adds_up_alike, gates_with_silu, weight_of

logger = logging.getLogger(__name__)

ONE_AT_A_TIME = threading.Lock()
"""transformers knows functions by names that the whole process shares."""
TOKENS = 37
"""How many tokens the examination has: a number that is no other dimension of a real model."""

PROBE = "multilora_probe"
HARMLESS = frozenset({"position_ids", "cache_position", "attention_mask", "position_embeddings", "input_ids"})
"""Tensors that layers hand down to their attention function and that no function of transformers reads."""


@dataclass(frozen=True)
class LinearFact:
    """A linear layer that reads every token's row. attended: how many attention layers have computed before it;
    source: the number of the tensor that it reads, the same for layers that read the same one."""

    path: str
    in_features: int
    out_features: int
    bias: bool
    transposed: bool
    attended: int
    source: int = -1


@dataclass(frozen=True)
class NormFact:
    """A norm with a weight and nothing else. token_dim: which dimension of its input, of so many, counts the
    tokens."""

    path: str
    size: int
    token_dim: int
    attended: int
    dims: int = 3


@dataclass(frozen=True)
class AttentionFact:
    """One call of the attention interface; window: see `MaskMeaning`. rotated: queries and keys are what the function
    that rotates has returned."""

    path: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: bool
    rotated: bool = False


@dataclass(frozen=True)
class ExpertsFact:
    """The experts of a mixture that compute what `TreeExperts` does, for every token's row. top_k: of them a token
    takes so many; silu: between their products is silu(gate) · up, gate first; attended: see `LinearFact`."""

    path: str
    experts: int
    hidden: int
    inner: int
    attended: int
    top_k: int
    silu: bool = False


@dataclass(frozen=True)
class Examination:
    """What serving a model takes, in the order in which its forward pass comes across it."""

    linears: tuple[LinearFact, ...]
    norms: tuple[NormFact, ...]
    attentions: tuple[AttentionFact, ...]
    head_attended: int
    experts: tuple[ExpertsFact, ...] = ()


class ObstacleError(Exception):
    """Why a model cannot be served, said where it is noticed."""


def examine(tree: Tree, architecture: str) -> Examination:
    """tree: on the meta device. Raises ModelUnsupported saying what keeps the model from being served."""
    for module in tree.decoder.modules():
        if isinstance(module, nn.Conv1d):
            raise ModelUnsupported(f"{architecture} is not supported: it mixes tokens by convolution")
    if getattr(tree.lm, "_is_stateful", False):
        raise ModelUnsupported(f"{architecture} is not supported: it keeps a recurrent state beside or instead of KV")
    try:
        with ONE_AT_A_TIME:
            windows = _Recorder(tree).run(masks=True)
            if not windows.attentions:
                raise ObstacleError("its attention does not go through transformers' attention interface")
            found = _Recorder(tree).run(masks=False)
    except ObstacleError as e:
        raise ModelUnsupported(f"{architecture} is not supported: {e}") from None
    except BROKEN as e:
        logger.debug("%s cannot be examined", architecture, exc_info=True)
        line = (str(e).splitlines() or [type(e).__name__])[0]
        why = "its forward pass depends on data" if "meta" in line else f"transformers cannot run it so: {line}"
        raise ModelUnsupported(f"{architecture} is not supported: {why}") from None
    if [a.path for a in windows.attentions] != [a.path for a in found.attentions]:
        raise ModelUnsupported(f"{architecture} is not supported: what it computes depends on its mask")
    pairs = zip(_rotated(tree, found), windows.attentions, strict=True)
    attentions = tuple(replace(a, window=w.window) for a, w in pairs)
    return replace(found, attentions=attentions, experts=_computed_alike(tree, found))


def _computed_alike(tree: Tree, found: Examination) -> tuple[ExpertsFact, ...]:
    """Those mixtures that compute what ours do."""
    alike = []
    for fact in found.experts:
        module = tree.lm.get_submodule(fact.path)
        if adds_up_alike(module):
            dtype = weight_of(module, DOWN).dtype
            alike.append(replace(fact, silu=gates_with_silu(module, dtype)))
    return tuple(alike)


def _rotated(tree: Tree, found: Examination) -> tuple[AttentionFact, ...]:
    """The same calls of attention, with those marked whose layer can leave its rotation to us."""
    layers = [tree.lm.get_submodule(path) for path in {a.path for a in found.attentions}]
    recorder = _Recorder(tree)
    try:
        with ONE_AT_A_TIME, recorder.noting_rotations(layers):
            again = recorder.run(masks=False)
    except (ObstacleError, *BROKEN):
        logger.debug("rotations stay where they are", exc_info=True)
        return found.attentions
    same = replace(again, attentions=tuple(replace(a, rotated=False) for a in again.attentions)) == found
    return again.attentions if same else found.attentions


class _Recorder:
    """One examination of a tree."""

    def __init__(self, tree: Tree):
        self._tree = tree
        self._paths = {id(m): path for path, m in tree.lm.named_modules()}
        self._linears: dict[str, LinearFact] = {}
        self._norms: dict[str, NormFact] = {}
        self._attentions: list[AttentionFact] = []
        self._experts: dict[str, ExpertsFact] = {}
        self._head_attended = 0
        self._looked_up: set[str] = set()
        self._sources: list[torch.Tensor] = []
        self._rotated: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(self, *, masks: bool) -> Examination:
        """masks: ask the model for its masks, else let it go without, as it is served."""
        tree = self._tree
        meta = torch.device("meta")
        config = tree.lm.config.get_text_config(decoder=True)
        embedding: nn.Embedding = tree.lm.get_submodule(tree.embedding_path)
        dtype = embedding.weight.dtype
        options = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.int64, device=meta)} if masks else {}
        positions = torch.empty(TOKENS, dtype=torch.int64, device=meta)
        with torch.device("meta"), torch.inference_mode(), self._registered(masks), self._hooks():
            x = torch.empty(TOKENS, embedding.embedding_dim, dtype=dtype, device=meta)
            hidden = tree.hidden(x, positions, **options)
            self._head_attended = len(self._attentions)
            logits = tree.logits(hidden)
            if len(self._attentions) > self._head_attended:
                raise ObstacleError("its head decodes again")
        self._check_tables(config.vocab_size)
        if hidden.shape[-1] != embedding.embedding_dim:
            raise ObstacleError("its rows are not as wide as its embedding")
        if hidden.shape[0] != TOKENS or logits.shape[0] != TOKENS or logits.shape[-1] != config.vocab_size:
            raise ObstacleError("it does not give every token one row of logits")
        linears, norms = tuple(self._linears.values()), tuple(self._norms.values())
        experts = tuple(self._experts.values())
        return Examination(linears, norms, tuple(self._attentions), self._head_attended, experts)

    @contextmanager
    def _registered(self, masks: bool) -> Iterator[None]:
        AttentionInterface.register(PROBE, self._attend)
        if masks:
            AttentionMaskInterface.register(PROBE, marked_mask)
        ALL_EXPERTS_FUNCTIONS.register(PROBE, self._note_experts)
        mixtures: list[Any] = [module for module in self._tree.lm.modules() if is_mixture(module)]
        before = [(m.config, m.config._experts_implementation) for m in mixtures]
        self._tree.attend_by(PROBE)
        for config, _ in before:
            config._experts_implementation = PROBE
        try:
            yield
        finally:
            for config, implementation in before:
                config._experts_implementation = implementation
            AttentionInterface._global_mapping.pop(PROBE)
            AttentionMaskInterface._global_mapping.pop(PROBE, None)
            ALL_EXPERTS_FUNCTIONS._global_mapping.pop(PROBE)

    @contextmanager
    def noting_rotations(self, layers: list[nn.Module]) -> Iterator[None]:
        """Note what these attention layers rotate."""

        def noted(rotation: Rotation) -> Rotation:
            def rotate(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
                q, k = rotation(*args, **kwargs)
                self._rotated = (q, k) if takes_whole_heads(args, kwargs, q.shape[-1]) else None
                return q, k

            return rotate

        patched: list[Any] = []
        try:
            for layer in layers:
                if (forward := with_rotation(layer, noted)) is not None:
                    layer.forward = forward
                    patched.append(layer)
            yield
        finally:
            for layer in patched:
                del layer.forward

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for module in self._tree.lm.modules():
            note: Callable[..., None] | None = None
            if isinstance(module, nn.Embedding):
                note = self._note_embedding
            if type(module) in (nn.Linear, Conv1D):
                note = self._note_linear
            elif is_norm(module):
                note = self._note_norm
            if note is not None:
                handles.append(module.register_forward_pre_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_embedding(self, module: Any, _: tuple[Any, ...]) -> None:
        self._looked_up.add(self._paths[id(module)])

    def _check_tables(self, rows: int) -> None:
        """Every table of tokens but the first must have been read: token ids are not there to read it by."""
        for module in self._tree.decoder.modules():
            path = self._paths.get(id(module), "")
            unread = path not in self._looked_up and path != self._tree.embedding_path
            if isinstance(module, nn.Embedding) and module.num_embeddings >= rows and unread:
                raise ObstacleError(f"its layers look up tokens in {path}, beside its embedding")

    def _note_linear(self, module: Any, args: tuple[Any, ...]) -> None:
        path, x = self._paths[id(module)], args[0] if args else None
        if x is None or x.shape.numel() != TOKENS * x.shape[-1] or self._tree.is_wide(f"{path}.weight"):
            self._linears.pop(path, None)
            return
        width = x.shape[-1]
        transposed = isinstance(module, Conv1D)
        out_features = module.nf if isinstance(module, Conv1D) else module.out_features
        attended, source = len(self._attentions), self._source(x)
        fact = LinearFact(path, width, out_features, module.bias is not None, transposed, attended, source)
        self._linears.setdefault(path, fact)

    def _source(self, x: torch.Tensor) -> int:
        """The number of a tensor. They are kept, so that none takes the place of another."""
        for number, seen in enumerate(self._sources):
            if seen is x:
                return number
        self._sources.append(x)
        return len(self._sources) - 1

    def _note_norm(self, module: Any, args: tuple[Any, ...]) -> None:
        path, dims = self._paths[id(module)], [i for i, n in enumerate(args[0].shape) if n == TOKENS]
        if len(dims) == 1:
            fact = NormFact(path, module.weight.shape[0], dims[0], len(self._attentions), args[0].dim())
            self._norms.setdefault(path, fact)

    def _note_experts(self, module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The experts interface of transformers, for an examination."""
        path, given = self._paths[id(module)], (x, *args)
        rows = len(given) == 3 and not kwargs and all(t.dim() == 2 and len(t) == TOKENS for t in given)
        weight = getattr(module, DOWN, None)
        if rows and weight is not None and weight.dim() == 3:
            count, hidden, inner = weight_of(module, DOWN).shape
            top_k = given[1].shape[1]
            self._experts.setdefault(path, ExpertsFact(path, count, hidden, inner, len(self._attentions), top_k))
        return torch.empty_like(x)

    def _attend(
        self, module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """The attention interface of transformers, for an examination."""
        self._check_shapes(query, key, value)
        meaning = _meaning(module, attention_mask, kwargs)
        sinks = kwargs.pop("s_aux", None)
        for name, given in kwargs.items():
            if isinstance(given, torch.Tensor) and name not in HARMLESS:
                raise ObstacleError(f"its attention takes {name}, which pages do not have")
        scale = kwargs.get("scaling")
        softcap = kwargs.get("softcap")
        fact = AttentionFact(
            path=self._paths[id(module)],
            heads=query.shape[1],
            kv_heads=key.shape[1],
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
            window=meaning.window,
            softcap=float(softcap) if softcap is not None else None,
            sinks=sinks is not None,
            rotated=self._rotated is not None and self._rotated[0] is query and self._rotated[1] is key,
        )
        self._rotated = None
        self._attentions.append(fact)
        return query.new_empty(1, TOKENS, fact.heads, fact.value_dim), None

    @staticmethod
    def _check_shapes(query: Any, key: Any, value: Any) -> None:
        for tensor in (query, key, value):
            if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != TOKENS:
                raise ObstacleError("it attends to something else than the tokens of its text")
        if query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
            raise ObstacleError("the heads of its queries, keys and values do not fit each other")


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm whose one parameter is a weight per feature."""
    params = dict(module.named_parameters())
    return "Norm" in type(module).__name__ and list(params) == ["weight"] and params["weight"].dim() == 1


def is_mixture(module: nn.Module) -> bool:
    """Return whether a module's experts go through transformers' interface, by what that gives them since 5.10."""
    return all(hasattr(module, name) for name in ("config", "has_gate", "has_bias", "is_transposed"))


def _meaning(module: Any, mask: Any, kwargs: dict[str, Any]) -> MaskMeaning:
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False and mask is None:
        raise ObstacleError("its attention is not causal")
    if mask is None:
        return MaskMeaning()
    if not isinstance(mask, MarkedMask):
        raise ObstacleError("it makes masks of its own, or adds a position bias to them")
    if mask.meaning.obstacle:
        raise ObstacleError(mask.meaning.obstacle)
    return mask.meaning
