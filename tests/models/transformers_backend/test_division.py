"""How transformers' plans for tensor parallelism are read. What comes out of it is held against PEFT in
`engine/test_architectures.py`."""

from pathlib import Path

import pytest
import torch
from architectures import tiny_config

from multilora.lora.sites import Shard
from multilora.models.transformers_backend.config import tree_config
from multilora.models.transformers_backend.division import Cut, Division


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
        (
            "OlmoeForCausalLM",
            "olmoe",
            "transformers' plan has 'packed_colwise' for layers.*.mlp.experts.gate_up_proj",
        ),
    ],
)
def test_what_ranks_cannot_share_is_said(architecture: str, model_type: str, said: str) -> None:
    assert division(architecture, model_type) == Division(obstacle=said)


def test_attention_needs_nothing_of_all_heads_where_they_are_divided() -> None:
    """GPT-OSS with a plan that divides its attention: the sinks are one parameter of all heads."""
    config = tiny_config("gpt_oss", "GptOssForCausalLM")
    heads = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise") | {"o_proj": "rowwise"}
    config.base_model_tp_plan = {f"layers.*.self_attn.{name}": style for name, style in heads.items()}
    found = tree_config(config, generation=None, context_length=64, dtype=torch.float32).division
    assert found == Division(obstacle="its attention has sinks of all heads, which transformers' plan divides")


def test_documentation_names_what_ranks_share() -> None:
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    assert "| Gemma3ForCausalLM | gemma3_text | through transformers | all |" in text
