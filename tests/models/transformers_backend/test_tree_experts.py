"""Which mixtures of transformers our products compute, and how their weights lie. Their answers with adapters are
held against PEFT in `engine/test_expert_parity.py` and `engine/test_architectures.py`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config, tiny_model
from torch import nn
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from multilora.models.load import make_model
from multilora.models.transformers_backend.experts import mixtures
from multilora.models.transformers_backend.materialize import materialize
from multilora.models.transformers_backend.modules import TreeStep
from multilora.models.transformers_backend.tree import Tree
from multilora.models.transformers_backend.tree_experts import (
    DOWN,
    GATE_UP,
    TreeExperts,
    adds_up_alike,
    fill_laid_out,
    gates_with_silu,
    lay_by_outputs,
    weight_of,
)

KINDS = {
    "as [experts, in, out], with biases, interleaved": ("GptOssForCausalLM", "gpt_oss", False),
    "as [experts, in, out]": ("AriaTextForCausalLM", "aria_text", True),
    "as [experts, out, in]": ("OlmoeForCausalLM", "olmoe", True),
    "with a limit": ("MiniMaxM3VLForCausalLM", "minimax_m3_vl_text", False),
}


def experts_of(architecture: str, model_type: str, **fields: Any) -> Any:
    config = tiny_config(model_type, architecture)
    for name, value in fields.items():
        setattr(config, name, value)
    return mixtures(Tree(config, architecture, torch.float32).lm)[0][1]


def olmoe(kind: type[nn.Module] = OlmoeExperts) -> Any:
    experts = copy.copy(experts_of("OlmoeForCausalLM", "olmoe"))
    experts._parameters = dict(experts._parameters)
    experts.__class__ = kind
    return experts


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_that_add_up_alike(kind: str) -> None:
    architecture, model_type, silu = KINDS[kind]
    experts = experts_of(architecture, model_type)
    assert adds_up_alike(experts)
    assert gates_with_silu(experts, torch.float32) == gates_with_silu(experts, torch.bfloat16) == silu


def test_another_activation_is_transformers_own() -> None:
    experts = experts_of("OlmoeForCausalLM", "olmoe", hidden_act="gelu")
    assert adds_up_alike(experts) and not gates_with_silu(experts, torch.float32)


class Limited(OlmoeExperts):
    """Its outputs have a limit that small numbers do not reach."""

    def forward(self, *args: Any) -> torch.Tensor:
        return super().forward(*args).clamp(-1e4, 1e4)


class Swapped(OlmoeExperts):
    """Its gate is behind up."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        up, gate = gate_up.chunk(2, dim=-1)
        swapped: torch.Tensor = self.act_fn(gate) * up
        return swapped


class Broken(OlmoeExperts):
    """Its gate is none."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_mixtures_that_compute_something_else_are_left() -> None:
    assert adds_up_alike(olmoe()) and not adds_up_alike(olmoe(Limited)) and not adds_up_alike(olmoe(Broken))
    assert adds_up_alike(olmoe(Swapped)) and not gates_with_silu(olmoe(Swapped), torch.float32)
    assert not gates_with_silu(olmoe(Broken), torch.float32)
    further = olmoe()
    further._parameters["scale"] = nn.Parameter(torch.ones(3))
    assert not adds_up_alike(further)
    narrow = olmoe()
    narrow._parameters[GATE_UP] = nn.Parameter(torch.empty(4, 60, 64))
    assert not adds_up_alike(narrow)
    reordered = olmoe()  # PEFT nests its wrappers in this order
    reordered._parameters[GATE_UP] = reordered._parameters.pop(GATE_UP)
    assert not adds_up_alike(reordered)


def test_weights_lie_by_outputs_under_their_own_shapes() -> None:
    lm = nn.Module()
    lm.experts = experts = experts_of("GptOssForCausalLM", "gpt_oss")
    lm.initialize_weights = lambda: None
    shapes = {name: p.shape for name, p in experts.named_parameters()}
    lay_by_outputs(experts)
    materialize(lm, torch.device("cpu"))
    assert {name: p.shape for name, p in experts.named_parameters()} == shapes
    for name in (GATE_UP, DOWN):
        assert not experts.get_parameter(name).is_contiguous() and weight_of(experts, name).is_contiguous()
        given = torch.randn(shapes[name])
        fill_laid_out(experts.get_parameter(name), given)
        assert torch.equal(experts.get_parameter(name), given)
    plain = experts_of("OlmoeForCausalLM", "olmoe")
    before = dict(plain.named_parameters())
    lay_by_outputs(plain)
    assert all(p is before[name] for name, p in plain.named_parameters())


def test_a_checkpoint_fills_what_lies_in_another_order(tmp_path: Path) -> None:
    config = tiny_config("gpt_oss", "GptOssForCausalLM")
    own = tiny_model("GptOssForCausalLM", config)
    own.save_pretrained(tmp_path)
    model: Any = make_model(str(tmp_path), device=torch.device("cpu"))
    model.load(str(tmp_path), load_format="auto", revision=None, seed=0)
    for layer, wanted in enumerate(own.model.layers):
        experts = model.lm.model.layers[layer].mlp.experts
        assert weight_of(experts, GATE_UP).is_contiguous()
        for name, param in wanted.mlp.experts.named_parameters():
            assert torch.equal(experts.get_parameter(name), param)
    model.load(str(tmp_path), load_format="dummy", revision=None, seed=0)
    assert weight_of(experts, DOWN).is_contiguous() and weight_of(experts, DOWN).isfinite().all()


@torch.inference_mode()
def test_a_bias_of_down_is_added_where_it_is_to_be() -> None:
    experts = experts_of("GptOssForCausalLM", "gpt_oss")
    for name, param in experts.named_parameters():
        setattr(experts, name, nn.Parameter(0.1 * torch.randn(param.shape), requires_grad=False))
    count, _, hidden = weight_of(experts, GATE_UP).shape
    x, taken, weights = torch.randn(5, hidden), torch.randint(count, (5, 2)), torch.rand(5, 2)
    added, without = (
        TreeExperts(experts, {}, TreeStep(), experts._apply_gate, adds_bias=adds).add_up(x, taken, weights, None)
        for adds in (True, False)
    )
    torch.testing.assert_close(added - without, (experts.down_proj_bias[taken] * weights[..., None]).sum(1))
