"""What the files say: methods by name, and the table of modules."""

import pytest
import torch

from multilora.adapter_tools.facts import Row, method, ranges, rows
from multilora.adapters.peft.config import parse_config
from multilora.adapters.peft.safetensors_file import TensorInfo

LAYERS = "base_model.model.model.layers"


def tensors(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    """Names with "__" for "."; F32."""
    found = {}
    for name, shape in shapes.items():
        found[name.replace("__", ".")] = TensorInfo(torch.float32, shape, 0, 4 * torch.Size(shape).numel())
    return found


def lora(module: str, layer: int, rank: int) -> dict[str, TensorInfo]:
    name = f"{LAYERS}.{layer}.{module}"
    a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    return {
        a: TensorInfo(torch.float32, (rank, 8), 0, 32 * rank),
        b: TensorInfo(torch.float32, (8, rank), 0, 32 * rank),
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "LoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"use_rslora": True, "use_dora": True}, "rsLoRA + DoRA"),
        ({"bias": "all", "modules_to_save": ["lm_head"]}, "LoRA + biases (all) + modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "LoRA + initialised by pissa_niter_4"),
        ({"init_lora_weights": "gaussian"}, "LoRA"),
        ({"alora_invocation_tokens": [5]}, "LoRA + activated"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": ["x" * 1000]}, str(["x" * 1000])[:100]),
    ],
)
def test_methods(fields, said):
    assert method({"peft_type": "LORA"} | fields) == said


def test_ranges():
    assert ranges([]) == ""
    assert ranges([3, 0, 1, 9, 10, 5]) == "0-1, 3, 5, 9-10"


def test_equal_modules_share_a_row():
    found = {}
    for layer in (0, 1, 2):
        for module in ("self_attn.v_proj", "self_attn.q_proj"):
            found |= lora(module, layer, 4)
    found |= lora("self_attn.q_proj", 3, 8) | lora("mlp.down_proj", 1, 8)
    assert rows(found, None) == [
        Row("LoRA", ["q_proj", "v_proj"], "0-2", 4, None, 6 * 64),
        Row("LoRA", ["q_proj"], "3", 8, None, 128),
        Row("LoRA", ["down_proj"], "1", 8, None, 128),
    ]


def test_everything_that_is_not_lora_has_a_kind_of_its_own():
    prefix = "base_model__model__"
    at = f"{prefix}model__layers__0__self_attn__q_proj"
    found = tensors(
        **{
            f"{at}__lora_magnitude_vector": (8,),
            f"{at}__lora_B__bias": (8,),
            f"{at}__bias": (8,),
            f"{prefix}model__norm__weight": (8,),
            f"{prefix}lm_head__modules_to_save__weight": (10, 8),
            f"{prefix}model__embed_tokens__token_adapter__trainable_tokens_delta": (2, 8),
            f"{prefix}model__embed_tokens__lora_embedding_A": (4, 10),
            f"{prefix}model__embed_tokens__lora_embedding_B": (8, 4),
            f"{prefix}x__scale": (3,),
        }
    )
    assert rows(found, None) == [
        Row("LoRA", ["embed_tokens"], "", 4, None, 72),
        Row("DoRA magnitude", ["q_proj"], "0", None, None, 8),
        Row("bias of lora_B", ["q_proj"], "0", None, None, 8),
        Row("trained tokens", ["embed_tokens"], "", None, None, 16),
        Row("bias", ["q_proj"], "0", None, None, 8),
        Row("whole weight", ["lm_head", "norm"], "", None, None, 88),
        Row("unknown", ["x.scale"], "", None, None, 3),
    ]


def test_the_rank_of_experts_is_that_of_one(tmp_path):
    """Stacked, one by one, and in PEFT's wrappers, whose shapes do not tell it."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["x"]}
    parsed = parse_config(config, tmp_path / "adapter_config.json")
    at = f"{LAYERS}.0.mlp.experts".replace(".", "__")
    found = rows(
        tensors(
            **{
                f"{at}__lora_A__weight": (24, 8),
                f"{at}__base_layer__lora_A__weight": (24, 8),
                f"{at}__gate_up_proj__lora_A__weight": (6, 4, 8),
                f"{at}__5__down_proj__lora_A__weight": (4, 8),
            }
        ),
        parsed,
    )
    assert {(row.rank, row.scaling) for row in found} == {(4, 2.0)}
    unread = rows(tensors(**{f"{at}__lora_A__weight": (24, 8)}), None)
    assert [row.rank for row in unread] == [None]
