"""Experts of transformers' mixtures, divided among ranks: each rank holds a part of the inner width of every expert.

So every rank routes all tokens and computes a share of each expert's output; the shares are summed once a layer.
Whether a mixture's outputs are such a sum is found by running transformers' code on stand-ins. Called by
`division.py` and `model.py`.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from multilora.distributed.group import Group
from multilora.errors import ConfigError
from multilora.models.transformers_backend.common_parts import BROKEN, SCALES
from multilora.models.transformers_backend.parameters import ParameterCut
from multilora.models.transformers_backend.probe import ObstacleError, is_mixture
from multilora.models.weights import take

SUMMED = "moe_tp_experts"
"""What a plan calls experts whose outputs are shares."""
PARAMETERS = {
    "packed_colwise": ParameterCut(-2, blocks=2),
    "packed_rowwise": ParameterCut(-1, blocks=2),
    "colwise": ParameterCut(-2),
    "rowwise": ParameterCut(-1),
}
"""What a plan calls the cuts of a parameter [experts, out, in] or [experts, in, out]; packed: gate, then up."""

EXPERTS, TOP_K, TOKENS, WIDTH = 3, 2, 5, 16
"""Sizes of a stand-in."""
ALIGNED = 16
"""Bytes: torch multiplies groups of rows on CUDA where rows of a weight begin at multiples of so many."""


def expert_cuts(lm: nn.Module, style: Callable[[str], str]) -> dict[str, ParameterCut]:
    """How the parameters of experts are divided, by their paths; those of experts that are left whole are missing.

    style: what the plan says of a path, "" where it says nothing. Raises ObstacleError if a plan divides experts in
    part, or in a way in which the ranks' shares do not add up.
    """
    found: dict[str, ParameterCut] = {}
    tried: set[type[nn.Module]] = set()
    for path, module in mixtures(lm):
        own = {
            name: PARAMETERS.get(style(f"{path}.{name}")) if param.dim() == 3 else None
            for name, param in module.named_parameters(recurse=False)
        }
        if style(path) != SUMMED and not any(own.values()):
            continue
        cuts = {name: cut for name, cut in own.items() if cut is not None}
        if style(path) != SUMMED or len(cuts) < len(own):
            raise ObstacleError(f"transformers' plan divides {path} in part")
        if type(module) not in tried and not shares_add_up(module, cuts):
            raise ObstacleError(f"what ranks compute of {path} does not add up")
        tried.add(type(module))
        found |= {f"{path}.{name}": cut for name, cut in cuts.items()}
    return found


def mixtures(lm: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of experts with its path."""
    return [(path, module) for path, module in lm.named_modules() if is_mixture(module)]


@torch.inference_mode()
def shares_add_up(experts: nn.Module, cuts: Mapping[str, ParameterCut]) -> bool:
    """Whether the outputs of two ranks, each with its part of the parameters, sum up to those of all of them.

    experts: a mixture that may be on the meta device. cuts: of all its parameters, by their names in it.
    """
    random = torch.Generator().manual_seed(0)
    params: dict[str, torch.Tensor] = {}
    for name, cut in cuts.items():
        shape = [EXPERTS, WIDTH, WIDTH]
        shape[cut.dim] *= 2 * cut.blocks
        params[name] = torch.randn(shape, generator=random)
    inputs = [scale * torch.randn(TOKENS, WIDTH, generator=random) for scale in SCALES]
    chosen = torch.rand(TOKENS, EXPERTS, generator=random).topk(TOP_K)

    def computed(held: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        twin: Any = copy.copy(experts)
        twin._parameters = {name: nn.Parameter(p.contiguous(), requires_grad=False) for name, p in held.items()}
        twin.num_experts = EXPERTS
        return [type(experts).forward(twin, x, chosen.indices, chosen.values) for x in inputs]

    try:
        whole = computed(params)
        shares = [
            computed({name: take(p, cuts[name].part(tuple(p.shape), rank, 2)) for name, p in params.items()})
            for rank in range(2)
        ]
    except BROKEN:
        return False
    return all(
        torch.allclose(first + second, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
        for y, first, second in zip(whole, *shares, strict=True)
    )


def sum_over_ranks(experts: nn.Module, path: str, group: Group, device: torch.device) -> None:
    """Have the outputs of experts that are divided, a share on every rank, summed.

    path: for messages. Raises ConfigError if the parts are too narrow for torch's product on this device.
    """
    for name, param in experts.named_parameters(recurse=False):
        row = max(param.stride()[-2:]) * param.element_size()  # in memory, whichever dimension lies there
        if device.type == "cuda" and row % ALIGNED:
            raise ConfigError(
                f"--tp-size {group.size}: {path}.{name}: torch does not multiply rows of {row} bytes, which are no "
                f"multiple of {ALIGNED}"
            )

    def hook(_module: nn.Module, _args: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        return group.all_reduce(y.reshape(-1, y.shape[-1])).view(y.shape)

    experts.register_forward_hook(hook)
