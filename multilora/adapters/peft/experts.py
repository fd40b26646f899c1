"""What an adapter's files hold for the experts of a mixture: three layouts, each of which becomes one block per site.

    experts.3.gate_proj.lora_A                 a module per expert: PEFT on models of older transformers, vLLM
    experts.base_layer.lora_A, experts.lora_A  PEFT's target_parameters, one wrapper around the other
    experts.gate_up_proj.lora_A (3-D)          stacked, as Megatron's exporters and SGLang have it

                    A                           B
    per expert      [rank, in]                  [out, rank]
    wrappers        [experts · rank, in]        [out, rank · experts]     column r · experts + e is expert e's r
    stacked         [experts, rank, in]         [experts, out, rank]      [1, …]: all experts share it

gate and up have a pair each or one together. Two pairs become one of both ranks, as PEFT itself makes them: A on top
of A, B beside B with zeros where one does not reach the other's columns. Called by `checkpoint.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from multilora.adapters.adapter import LowRank
from multilora.adapters.peft.base_model import ExpertPlace, Place
from multilora.adapters.peft.checkpoint_lora import PAIR
from multilora.adapters.peft.contents import Contents, Module
from multilora.adapters.peft.tensor_names import Part
from multilora.adapters.sources.files import show
from multilora.errors import AdapterIncompatible, AdapterInvalid, AdapterUnsupported


@dataclass(frozen=True)
class _Pair:
    """A [experts, rank, in] and B [experts, out, rank] of one module; one expert's or one for all: [1, …]."""

    at: ExpertPlace
    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def check(contents: Contents) -> list[Module]:
    """The modules of experts that have LoRA. Raises AdapterInvalid, AdapterIncompatible or AdapterUnsupported."""
    found = []
    for module in contents.experts.values():
        for part in module.tensors:
            if part not in PAIR:
                what = f"{part.value} of {show(module.name)}: on experts lora_A and lora_B are served, nothing else"
                raise contents.error(AdapterUnsupported, module, part, what)
        for part, other in (PAIR, PAIR[::-1]):
            if part not in module.tensors:
                raise contents.error(AdapterInvalid, module, other, f"{other.value} without its {part.value}")
        if contents.config.use_dora or contents.config.lora_bias:
            field = "use_dora" if contents.config.use_dora else "lora_bias"
            what = f"{field} on experts ({show(module.name)}) is not supported"
            raise contents.error(AdapterUnsupported, module, Part.LORA_A, what)
        _check_target(module, contents)
        _check_shapes(module, contents)
        found.append(module)
    _check_overlaps(found, contents)
    return found


def rank_of(module: Module, contents: Contents) -> int:
    """The rank of a module that has passed `check`."""
    shape = contents.tensors.shape(module.tensors[Part.LORA_A])
    if len(shape) == 3:
        return shape[1]
    at = contents.base.expert_place(module.place)
    return shape[0] if at.expert is not None else shape[0] // at.experts


def read(modules: list[Module], contents: Contents) -> Iterator[LowRank]:
    """One block for each site of experts."""
    by_site: dict[Place, list[Module]] = {}
    for module in modules:
        by_site.setdefault(contents.base.expert_place(module.place).whole, []).append(module)
    for place, own in by_site.items():
        yield _merged(place, [_read(module, contents) for module in own])


def _check_target(module: Module, contents: Contents) -> None:
    at = contents.base.expert_place(module.place)
    config, container = contents.config, module.name.removesuffix(f".{module.name.rpartition('.')[2]}")
    names = [module.name]
    if at.expert is None:  # those who write stacked tensors name the modules of single experts, or all of them
        names += [container, *(f"{container}.0.{part}" for part in at.parts)]
    if not (config.targets_parameter(module.name) or any(config.targets(name, contents.base) for name in names)):
        what = f"{config.file} does not target module {show(module.name)}"
        raise contents.error(AdapterInvalid, module, Part.LORA_A, what)


def _check_shapes(module: Module, contents: Contents) -> None:
    at = contents.base.expert_place(module.place)
    a, b = (contents.tensors.shape(module.tensors[part]) for part in PAIR)
    if not at.parts and len(a) == 3:
        what = (
            f"{show(module.name)}: stacked tensors are not supported here, where gate and up may be interleaved; "
            "PEFT's target_parameters are"
        )
        raise contents.error(AdapterUnsupported, module, Part.LORA_A, what)
    rank = contents.config.rank(module.name)
    count = 1 if at.expert is not None else at.experts
    flat = (count * rank, at.in_features), (at.width, count * rank)
    expected: list[tuple[tuple[int, ...], tuple[int, ...]]] = [flat]
    if at.expert is None:
        counts = {1, at.experts}
        expected += [((m, rank, at.in_features), (n, at.width, rank)) for m in counts for n in counts]
    if (a, b) not in expected:
        what = (
            f"{show(module.name)} does not fit the base model, whose {at.experts} experts with rank {rank} (r or "
            f"rank_pattern in {contents.config.file}) need lora_A {list(flat[0])} and lora_B {list(flat[1])}; "
            f"found {list(a)} and {list(b)}"
        )
        raise contents.error(AdapterIncompatible, module, Part.LORA_A, what)


def _check_overlaps(modules: list[Module], contents: Contents) -> None:
    """Check that no columns of an expert are given twice. Raises AdapterInvalid."""
    taken: dict[tuple[Place, int | None, int], Module] = {}
    for module in modules:
        at = contents.base.expert_place(module.place)
        columns = [at.offset] if at.width < at.out_features else at.starts
        experts: Iterable[int | None] = (at.expert,) if at.expert is not None else (None, *range(at.experts))
        for key in ((at.whole, expert, column) for expert in experts for column in columns):
            if other := taken.get(key):
                what = f"{show(module.name)} and {show(other.name)} are the same columns of one expert"
                raise contents.error(AdapterInvalid, module, Part.LORA_A, what)
            taken[key] = module


def _read(module: Module, contents: Contents) -> _Pair:
    at = contents.base.expert_place(module.place)
    a, b = (contents.tensors.read(module.tensors[part]) for part in PAIR)
    rank = rank_of(module, contents)
    if a.ndim == 2 and at.expert is None:
        a = a.view(at.experts, rank, at.in_features)
        b = b.view(at.width, rank, at.experts).permute(2, 0, 1)
    elif a.ndim == 2:
        a, b = a[None], b[None]
    return _Pair(at, a, b, contents.config.scaling(module.name, rank))


def _merged(place: Place, pairs: list[_Pair]) -> LowRank:
    """One pair for all experts and columns of a site."""
    scalings = {pair.scaling for pair in pairs}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    own_rank = max(pair.rank for pair in pairs)
    if len(pairs) == 1 and pairs[0].at.expert is None and pairs[0].at.width == pairs[0].at.out_features:
        return LowRank(*place, pairs[0].a, pairs[0].b.mT, scaling)
    at = pairs[0].at
    firsts, rank = _first_rows(pairs)
    single = any(pair.at.expert is not None for pair in pairs)
    experts_a = at.experts if single else max(len(pair.a) for pair in pairs)
    experts_b = at.experts if single else max(len(pair.b) for pair in pairs)
    exact = scaling == 1.0 and any(pair.scaling != 1.0 for pair in pairs)  # they differ, and are folded in here
    a = torch.zeros(experts_a, rank, at.in_features, dtype=_widest(pair.a for pair in pairs))
    b = torch.zeros(experts_b, rank, at.out_features, dtype=torch.float32 if exact else _widest(p.b for p in pairs))
    for pair in pairs:
        rows = slice(firsts[_columns(pair)], firsts[_columns(pair)] + pair.rank)
        experts = slice(None) if pair.at.expert is None else slice(pair.at.expert, pair.at.expert + 1)
        a[experts, rows] = pair.a.to(a.dtype)
        columns = slice(pair.at.offset, pair.at.offset + pair.at.width)
        b[experts, rows, columns] = pair.b.mT.to(b.dtype) * (pair.scaling if exact else 1.0)
    return LowRank(*place, a, b, scaling, own_rank)


def _columns(pair: _Pair) -> tuple[int, int]:
    return pair.at.offset, pair.at.width


def _first_rows(pairs: list[_Pair]) -> tuple[dict[tuple[int, int], int], int]:
    """Columns of the site that modules have → the first row of their A, and the number of all rows; the largest rank
    of an expert counts."""
    first, found = 0, {}
    for columns in sorted({_columns(pair) for pair in pairs}):
        found[columns] = first
        first += max(pair.rank for pair in pairs if _columns(pair) == columns)
    return found, first


def _widest(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    found: torch.dtype | None = None
    for tensor in tensors:
        found = tensor.dtype if found is None else torch.promote_types(found, tensor.dtype)
    assert found is not None
    return found
