"""Names of tensors: PEFT's spellings, old and new, and what is none of them."""

import pytest

from multilora.adapters.peft.tensor_names import Part, parse

Q = "model.layers.0.self_attn.q_proj"
E = "model.embed_tokens"

NAMES: dict[str, tuple[str, Part, str | None]] = {
    f"base_model.model.{Q}.lora_A.weight": (Q, Part.LORA_A, None),
    f"{Q}.lora_A.weight": (Q, Part.LORA_A, None),
    f"base_model.model.{Q}.lora_B.default.weight": (Q, Part.LORA_B, "default"),
    f"{Q}.lora_B.weight.weight": (Q, Part.LORA_B, "weight"),
    f"{Q}.lora_B.bias": (Q, Part.LORA_BIAS, None),
    f"{Q}.lora_B.mine.bias": (Q, Part.LORA_BIAS, "mine"),
    f"{E}.lora_embedding_A": (E, Part.EMBEDDING_A, None),
    f"{E}.lora_embedding_B.default": (E, Part.EMBEDDING_B, "default"),
    f"{Q}.lora_magnitude_vector": (Q, Part.MAGNITUDE, None),
    f"{Q}.lora_magnitude_vector.weight": (Q, Part.MAGNITUDE, None),
    f"{Q}.lora_magnitude_vector.default": (Q, Part.MAGNITUDE, "default"),
    f"{Q}.lora_magnitude_vector.default.weight": (Q, Part.MAGNITUDE, "default"),
    f"{Q}.base_layer.weight": (Q, Part.BASE_WEIGHT, None),
    f"{Q}.base_layer.bias": (Q, Part.BASE_BIAS, None),
    f"{Q}.base_layer.lora_A.weight": (f"{Q}.base_layer", Part.LORA_A, None),
    f"{Q}.base_layer.base_layer.lora_B.default.weight": (f"{Q}.base_layer.base_layer", Part.LORA_B, "default"),
    f"{Q}.weight": (Q, Part.WEIGHT, None),
    f"{Q}.bias": (Q, Part.BIAS, None),
    "lm_head.weight": ("lm_head", Part.WEIGHT, None),
    "lm_head.modules_to_save.weight": ("lm_head", Part.SAVED_WEIGHT, None),
    "lm_head.modules_to_save.default.bias": ("lm_head", Part.SAVED_BIAS, "default"),
    "lm_head.original_module.weight": ("lm_head", Part.ORIGINAL_WEIGHT, None),
    f"{E}.token_adapter.trainable_tokens_delta": (E, Part.TOKENS, None),
    f"{E}.token_adapter.trainable_tokens_delta.default": (E, Part.TOKENS, "default"),
    f"{E}.token_adapter.base_layer.weight": (E, Part.TOKENS_BASE, None),
    f"{Q}.lora_velora_embed": (Q, Part.VELORA, None),
}
STRANGE = [
    "",
    "weight",
    "base_model.model.weight",
    "lora_A.weight",
    f"{Q}.lora_A",
    f"{Q}.lora_A.bias",
    f"{Q}.lora_A.one.two.weight",
    f"{Q}.lora_A.weight.scale",
    f"{Q}.scale",
    f"{E}.lora_embedding_A.one.two",
    f"{E}.trainable_tokens_delta",
    f"{E}.token_adapter.trainable_tokens_original",
    f"{E}.token_adapter.base_layer.bias",
    f"{E}.token_adapter.lora_A.weight",
    f"{Q}.base_layer.default.weight",
    f"{Q}.base_layer.token_adapter.base_layer.weight",
    "lm_head.modules_to_save.default.gate_proj.weight",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_peft_gives(name: str) -> None:
    found = parse(name)
    assert found is not None
    assert (found.module, found.part, found.adapter) == NAMES[name]


@pytest.mark.parametrize("name", STRANGE)
def test_other_names(name: str) -> None:
    assert parse(name) is None


def test_a_very_long_name_takes_no_time() -> None:
    assert parse("a." * 200_000 + "x") is None
    assert parse("lora_A" * 200_000) is None
