"""Experts of transformers' mixtures, divided among ranks: each rank holds a part of the inner width of every expert.

So every rank routes all tokens and computes a share of each expert's output; the shares are summed once a layer.
Whether a mixture's outputs are such a sum is found by running transformers' code on stand-ins. A bias of down is
added by one rank. Called by `division.py` and `model.py`.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from multilora.distributed.group import Group
from multilora.errors import ConfigError
from multilora.models.transformers_backend.common_parts import BROKEN, SCALES
from multilora.models.transformers_backend.parameters import ParameterCut
from multilora.models.transformers_backend.probe import ObstacleError, is_mixture
from multilora.models.transformers_backend.tree_experts import BIAS, DOWN
from multilora.models.weights import take

SUMMED = "moe_tp_experts"
"""What a plan calls experts whose outputs are shares."""
PARAMETERS = {
    "packed_colwise": ParameterCut(-2, blocks=2),
    "packed_rowwise": ParameterCut(-1, blocks=2),
    "colwise": ParameterCut(-2),
    "rowwise": ParameterCut(-1),
    "paired_rowwise": ParameterCut(-1, unit=2),
}
"""What a plan calls the cuts of a parameter [experts, out, in] or [experts, in, out]; packed: gate, then up. paired,
a word of our plans: a column of gate and one of up in turns."""
ONCE = "added_once"
"""What our plans call a bias that every rank has whole and one of them adds."""

EXPERTS, TOP_K, TOKENS, WIDTH = 3, 2, 5, 16
"""Sizes of a stand-in."""
ALIGNED = 16
"""Bytes: torch multiplies groups of rows on CUDA where rows of a weight begin at multiples of so many."""


def expert_cuts(
    lm: nn.Module, style: Callable[[str], str], computed_alike: Collection[str] = ()
) -> dict[str, ParameterCut]:
    """How the parameters of experts are divided, by their paths; those of experts that are left whole are missing,
    and so is a bias that one rank adds.

    style: what the plan says of a path, "" where it says nothing. computed_alike: the paths of experts that
    `TreeExperts` computes, which can leave a bias out. Raises ObstacleError if a plan divides experts in part, or in
    a way in which the ranks' shares do not add up.
    """
    found: dict[str, ParameterCut] = {}
    tried: set[type[nn.Module]] = set()
    for path, module in mixtures(lm):
        own = {name: style(f"{path}.{name}") for name, _ in module.named_parameters(recurse=False)}
        cuts = {name: PARAMETERS[said] for name, said in own.items() if said in PARAMETERS}
        once = {name for name, said in own.items() if said == ONCE and name == DOWN + BIAS}
        if style(path) != SUMMED and not cuts:
            continue
        if style(path) != SUMMED or len(cuts) + len(once) < len(own):
            raise ObstacleError(f"transformers' plan divides {path} in part")
        if once and path not in computed_alike:
            raise ObstacleError(f"transformers adds up {path} itself, with a bias on every rank")
        if type(module) not in tried and not shares_add_up(module, cuts, once):
            raise ObstacleError(f"what ranks compute of {path} does not add up")
        tried.add(type(module))
        found |= {f"{path}.{name}": cut for name, cut in cuts.items()}
    return found


def mixtures(lm: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of experts with its path."""
    return [(path, module) for path, module in lm.named_modules() if is_mixture(module)]


@torch.inference_mode()
def shares_add_up(experts: nn.Module, cuts: Mapping[str, ParameterCut], once: Collection[str] = ()) -> bool:
    """Whether the outputs of two ranks, each with its part of the parameters, sum up to those of all of them.

    experts: a mixture that may be on the meta device. cuts: of its parameters, by their names in it; once: those that
    the first rank adds whole, as wide as its outputs. Together they are all.
    """
    random = torch.Generator().manual_seed(0)
    params: dict[str, torch.Tensor] = {}
    for name, whole in experts.named_parameters(recurse=False):
        shape = [EXPERTS, *(WIDTH,) * (whole.dim() - 1)]
        if name in cuts:
            shape[cuts[name].dim] *= 2 * cuts[name].blocks * cuts[name].unit
        params[name] = torch.randn(shape, generator=random)
    inputs = [scale * torch.randn(TOKENS, WIDTH, generator=random) for scale in SCALES]
    chosen = torch.rand(TOKENS, EXPERTS, generator=random).topk(TOP_K)

    def computed(held: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        twin: Any = copy.copy(experts)
        twin._parameters = {name: nn.Parameter(p.contiguous(), requires_grad=False) for name, p in held.items()}
        twin.num_experts = EXPERTS
        return [type(experts).forward(twin, x, chosen.indices, chosen.values) for x in inputs]

    def held(rank: int) -> dict[str, torch.Tensor]:
        parts = {name: take(params[name], cut.part(tuple(params[name].shape), rank, 2)) for name, cut in cuts.items()}
        return parts | {name: torch.zeros_like(params[name]) if rank else params[name] for name in once}

    try:
        found = computed(params)
        shares = [computed(held(rank)) for rank in range(2)]
    except BROKEN:
        return False
    return all(
        torch.allclose(first + second, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
        for y, first, second in zip(found, *shares, strict=True)
    )


def sum_over_ranks(experts: nn.Module, path: str, group: Group, device: torch.device) -> None:
    """Have the outputs of experts that are divided, a share on every rank, summed.

    path: for messages. Raises ConfigError if the parts are too narrow for torch's product on this device.
    """
    weights = [(name, param) for name, param in experts.named_parameters(recurse=False) if param.dim() == 3]
    for name, param in weights:
        row = max(param.stride()[-2:]) * param.element_size()  # in memory, whichever dimension lies there
        if device.type == "cuda" and row % ALIGNED:
            raise ConfigError(
                f"--tp-size {group.size}: {path}.{name}: torch does not multiply rows of {row} bytes, which are no "
                f"multiple of {ALIGNED}"
            )

    def hook(_module: nn.Module, _args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        return group.all_reduce(y.reshape(-1, y.shape[-1])).view(y.shape)

    experts.register_forward_hook(hook)
