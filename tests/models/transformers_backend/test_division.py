"""How transformers' plans for tensor parallelism are read. What comes out of it is held against PEFT in
`engine/test_architectures.py`."""

from pathlib import Path

import pytest
import torch
from architectures import tiny_config

from multilora.lora.sites import Shard
from multilora.models.transformers_backend.config import tree_config
from multilora.models.transformers_backend.division import Cut, Division, divide
from multilora.models.transformers_backend.parameters import ParameterCut
from multilora.models.transformers_backend.probe import examine
from multilora.models.transformers_backend.tree import Tree


def division(architecture: str, model_type: str) -> Division:
    config = tiny_config(model_type, architecture)
    return tree_config(config, generation=None, context_length=64, dtype=torch.float32).division


def test_heads_are_cut_as_wholes_and_down_by_its_inputs() -> None:
    found = division("Gemma3ForCausalLM", "gemma3_text")
    assert found.heads and not found.obstacle
    layer = {path.removeprefix("model.layers.1."): cut for path, cut in found.cuts.items() if ".1." in path}
    assert layer == {
        "self_attn.q_proj": Cut(Shard.COLUMN, 16),
        "self_attn.k_proj": Cut(Shard.KV, 16),
        "self_attn.v_proj": Cut(Shard.KV, 16),
        "self_attn.o_proj": Cut(Shard.ROW),
        "mlp.gate_proj": Cut(Shard.COLUMN),
        "mlp.up_proj": Cut(Shard.COLUMN),
        "mlp.down_proj": Cut(Shard.ROW),
    }


def test_a_merged_projection_is_cut_by_heads_where_each_head_has_its_part_of_it() -> None:
    found = division("GPTNeoXForCausalLM", "gpt_neox")
    assert found.cuts["gpt_neox.layers.0.attention.query_key_value"] == Cut(Shard.COLUMN, 3 * 16)


def test_attention_that_norms_all_heads_together_is_whole() -> None:
    found = division("Olmo2ForCausalLM", "olmo2")
    assert not found.heads and {path.split(".")[3] for path in found.cuts} == {"mlp"}


@pytest.mark.parametrize(
    ("architecture", "model_type", "said"),
    [
        ("GPT2LMHeadModel", "gpt2", "transformers has no plan that divides it"),
        ("Phi3ForCausalLM", "phi3", "transformers' plan divides none of its layers"),
        ("PhiForCausalLM", "phi", "its head has a bias"),
    ],
)
def test_what_ranks_cannot_share_is_said(architecture: str, model_type: str, said: str) -> None:
    assert division(architecture, model_type) == Division(obstacle=said)


def test_gpt_oss_has_a_plan_of_ours() -> None:
    """A column of gate and one of up stay together; one rank adds down's bias, which all have whole."""
    found = division("GptOssForCausalLM", "gpt_oss")
    assert found.heads and not found.obstacle
    layer = {path.removeprefix("model.layers.1."): cut for path, cut in found.parameters.items() if ".1." in path}
    assert layer == {
        "self_attn.sinks": ParameterCut(-1),
        "mlp.experts.gate_up_proj": ParameterCut(-1, unit=2),
        "mlp.experts.gate_up_proj_bias": ParameterCut(-1, unit=2),
        "mlp.experts.down_proj": ParameterCut(-2),
    }


def test_experts_are_divided_and_what_the_plan_leaves_is_whole() -> None:
    found = division("DeepseekV3ForCausalLM", "deepseek_v3")
    assert not found.heads and not found.obstacle
    assert set(found.parameters) == {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert {path.removeprefix("model.layers.1.mlp.") for path in found.cuts if ".1." in path} == {
        f"shared_experts.{name}_proj" for name in ("gate", "up", "down")
    }


@pytest.mark.parametrize("direct", [False, True])
def test_latent_rows_are_whole_and_heads_are_cut_behind_them(direct: bool) -> None:
    """direct: queries are made from the layer's rows."""
    config = tiny_config("deepseek_v2", "DeepseekV2ForCausalLM")
    config.attention_bias = True
    if direct:
        config.q_lora_rank = None
    found = tree_config(config, generation=None, context_length=64, dtype=torch.float32).division
    assert found.heads and not found.obstacle
    attention = "model.layers.0.self_attn."
    layer = {path.removeprefix(attention): cut for path, cut in found.cuts.items() if path.startswith(attention)}
    assert layer == {
        "q_proj" if direct else "q_b_proj": Cut(Shard.COLUMN, 24),
        "kv_b_proj": Cut(Shard.COLUMN, 32),
        "o_proj": Cut(Shard.ROW),
    }


def test_what_attention_has_of_each_head_is_cut_with_them() -> None:
    sinks, bias = division("GraniteSWAForCausalLM", "granite_swa"), division("BeamForCausalLM", "beam")
    assert sinks.heads and sinks.parameters["model.layers.0.self_attn.sinks"] == ParameterCut(-1)
    assert bias.heads and bias.parameters["model.layers.0.self_attn.gate_bias"] == ParameterCut(-1)


def with_plan(**styles: str) -> Division:
    """An OLMoE whose plan has these styles, instead, for what is below a layer."""
    config = tiny_config("olmoe", "OlmoeForCausalLM")
    config.base_model_tp_plan = dict(config.base_model_tp_plan)
    config.base_model_tp_plan |= {f"layers.*.{name.replace('__', '.')}": style for name, style in styles.items()}
    return tree_config(config, generation=None, context_length=64, dtype=torch.float32).division


def test_other_styles_are_refused_by_name_unless_nothing_has_that_name() -> None:
    for name, style in (("mlp.experts", "ep_dispatch_experts"), ("self_attn.q_proj", "packed_colwise")):
        said = f"transformers' plan has {style!r} for layers.*.{name}"
        assert with_plan(**{name.replace(".", "__"): style}) == Division(obstacle=said)
    assert with_plan(mlp__identity="moe_identity_expert") == with_plan()
    partly = with_plan(mlp__experts__down_proj="replicated_with_grad_allreduce")
    assert partly == Division(obstacle="transformers' plan divides model.layers.0.mlp.experts in part")


def test_attention_needs_nothing_of_all_heads_where_they_are_divided() -> None:
    """GPT-OSS with a plan that divides its attention: the sinks are one parameter of all heads."""
    config = tiny_config("gpt_oss", "GptOssForCausalLM")
    heads = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"o_proj": "rowwise"}
    plan = {f"layers.*.self_attn.{name}": style for name, style in heads.items()}
    tree = Tree(config, "GptOssForCausalLM", torch.float32)
    found = divide(tree.lm, plan, tree.lm.base_model_prefix, examine(tree, "GptOssForCausalLM"))
    assert found == Division(obstacle="its attention has sinks of all heads, which transformers' plan divides")


def test_documentation_names_what_ranks_share() -> None:
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    assert "| Gemma3ForCausalLM | gemma3_text | through transformers | all |" in text
    assert "| DeepseekV3ForCausalLM | deepseek_v3 | through transformers | all but attention |" in text
