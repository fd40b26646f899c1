"""Which experts of transformers' mixtures ranks divide. Their answers are held against PEFT in
`engine/test_architectures.py`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import tiny_config
from torch import nn
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from multilora.errors import ConfigError
from multilora.models.transformers_backend.experts import (
    ONCE,
    PARAMETERS,
    SUMMED,
    expert_cuts,
    mixtures,
    shares_add_up,
    sum_over_ranks,
)
from multilora.models.transformers_backend.parameters import ParameterCut
from multilora.models.transformers_backend.probe import ObstacleError
from multilora.models.transformers_backend.tree import Tree

PACKED = {"gate_up_proj": PARAMETERS["packed_colwise"], "down_proj": PARAMETERS["rowwise"]}
PLAN = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise", "experts": SUMMED}


def tree(architecture: str, model_type: str) -> nn.Module:
    lm: nn.Module = Tree(tiny_config(model_type, architecture), architecture, torch.float32).lm
    return lm


def experts_of(architecture: str, model_type: str) -> nn.Module:
    return mixtures(tree(architecture, model_type))[0][1]


def planned(plan: dict[str, str]) -> Callable[[str], str]:
    """The style of a path by its last name."""
    return lambda path: plan.get(path.rpartition(".")[2], "")


def test_gate_and_up_are_cut_alike_and_down_by_its_inputs() -> None:
    found = expert_cuts(tree("OlmoeForCausalLM", "olmoe"), planned(PLAN))
    paths = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    assert found == {f"{path}.{name}": cut for path in paths for name, cut in PACKED.items()}


def test_what_the_plan_does_not_name_is_whole() -> None:
    assert expert_cuts(tree("OlmoeForCausalLM", "olmoe"), planned({})) == {}
    assert expert_cuts(tree("LlamaForCausalLM", "llama"), planned(PLAN)) == {}


@pytest.mark.parametrize("missing", PLAN)
def test_a_plan_for_a_part_of_the_experts_is_refused(missing: str) -> None:
    plan = {name: style for name, style in PLAN.items() if name != missing}
    with pytest.raises(ObstacleError, match=r"plan divides model\.layers\.0\.mlp\.experts in part"):
        expert_cuts(tree("OlmoeForCausalLM", "olmoe"), planned(plan))


INTERLEAVED = {
    "experts": SUMMED,
    "gate_up_proj": "paired_rowwise",
    "gate_up_proj_bias": "paired_rowwise",
    "down_proj": "colwise",
    "down_proj_bias": ONCE,
}


def test_a_bias_of_down_is_whole_where_it_can_be_left_out() -> None:
    lm = tree("GptOssForCausalLM", "gpt_oss")
    paths = [path for path, _ in mixtures(lm)]
    assert expert_cuts(lm, planned(INTERLEAVED), paths) == {
        f"{path}.{name}": PARAMETERS[style]
        for path in paths
        for name, style in INTERLEAVED.items()
        if style in PARAMETERS
    }
    with pytest.raises(ObstacleError, match=r"adds up model\.layers\.1\.mlp\.experts itself, with a bias"):
        expert_cuts(lm, planned(INTERLEAVED), paths[:1])


@pytest.mark.parametrize(
    ("style", "said"),
    [
        ({"down_proj_bias": ""}, "in part"),
        ({"gate_up_proj_bias": ONCE}, "in part"),
        ({"down_proj_bias": "rowwise"}, "does not add up"),
        ({"gate_up_proj": "packed_rowwise", "gate_up_proj_bias": "packed_rowwise"}, "does not add up"),
    ],
)
def test_biases_are_cut_as_their_outputs_are(style: dict[str, str], said: str) -> None:
    lm = tree("GptOssForCausalLM", "gpt_oss")
    plan, paths = planned(INTERLEAVED | style), [path for path, _ in mixtures(lm)]
    with pytest.raises(ObstacleError, match=said):
        expert_cuts(lm, plan, paths)


def test_shares_add_up_where_experts_are_held_in_either_way_and_gated_otherwise() -> None:
    assert shares_add_up(experts_of("OlmoeForCausalLM", "olmoe"), PACKED)
    transposed = {"gate_up_proj": PARAMETERS["packed_rowwise"], "down_proj": PARAMETERS["colwise"]}
    assert shares_add_up(experts_of("AriaTextForCausalLM", "aria_text"), transposed)
    clamped = experts_of("MiniMaxM3VLForCausalLM", "minimax_m3_vl_text")
    assert isinstance(clamped, MiniMaxM3VLExperts) and shares_add_up(clamped, PACKED)


class Limited(OlmoeExperts):
    """Its outputs have a limit that small numbers do not reach."""

    def forward(self, *args: Any) -> torch.Tensor:
        return super().forward(*args).clamp(-1e4, 1e4)


class Normed(OlmoeExperts):
    """Its gate looks at the whole width."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.softmax(dim=-1) * up


@pytest.mark.parametrize("kind", [Limited, Normed])
def test_shares_of_what_is_no_sum_do_not_add_up(kind: type[nn.Module]) -> None:
    lm = tree("OlmoeForCausalLM", "olmoe")
    experts = copy.copy(mixtures(lm)[0][1])
    experts.__class__ = kind
    assert not shares_add_up(experts, PACKED)
    lm.set_submodule("model.layers.1.mlp.experts", experts)
    with pytest.raises(ObstacleError, match=r"of model\.layers\.1\.mlp\.experts does not add up"):
        expert_cuts(lm, planned(PLAN))


def test_halves_that_are_cut_as_one_do_not_add_up() -> None:
    experts = experts_of("OlmoeForCausalLM", "olmoe")
    assert not shares_add_up(experts, PACKED | {"gate_up_proj": ParameterCut(-2)})


class Doubling:
    rank, size, exchange = 0, 2, None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_outputs_are_summed_once_and_keep_their_shape() -> None:
    module = nn.Identity()
    sum_over_ranks(module, "experts", Doubling(), torch.device("cpu"))  # type: ignore[arg-type]
    x = torch.ones(1, 3, 4)
    assert torch.equal(module(x), 2 * x)


def test_rows_that_torch_does_not_multiply_are_named() -> None:
    experts = nn.Module()
    experts.down_proj = nn.Parameter(torch.empty(4, 64, 12, dtype=torch.bfloat16))
    cuda = torch.device("cuda")
    with pytest.raises(
        ConfigError, match=r"--tp-size 2: x\.experts\.down_proj: torch does not multiply rows of 24 b"
    ):
        sum_over_ranks(experts, "x.experts", Doubling(), cuda)  # type: ignore[arg-type]
