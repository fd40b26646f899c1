"""Quantised base models under adapters in 16 bit: the answers are those of transformers and PEFT over the same base.

The base is computed there by definitions written for the second time. Adapters, one with DoRA, share a batch
with the base model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_integers
import pytest
import torch
from exactness import judge
from fakes.engine_driver import EngineDriver
from fakes.models import make_tiny_model
from fp8_definitions import (
    FLOATS,
    FP8,
    TOKENS,
    by_row,
    by_tensor,
    compressed,
    from_blocks,
    from_given,
    from_tensor,
    given,
    in_blocks,
    rounded,
    unrounded,
)
from integer_definitions import (
    GPTQ,
    GROUPS,
    awq,
    from_awq,
    from_gptq,
    from_packed,
    gptq,
    gptq_8,
    packed,
    packed_in_any_order,
    shuffled,
)
from quantised import (
    Tensors,
    clear_prompt,
    decoder_linears,
    held_against_peft,
    plain_twin,
    round_at,
    with_adapter,
    write_quantised,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from multilora.errors import ConfigError
from multilora.layers.weights.base import Weight
from multilora.layers.weights.int4 import Int4Weight

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    "dora": {"r": 4, "target_modules": ["k_proj", "o_proj", "gate_proj"], "use_dora": True},
    "ends": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["gate_proj", "lm_head"]},
}
Dequantise = Callable[[Tensors], tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]


WIDE = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4}
SKIPPED = {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp", "layers.1.self_attn.k_proj"]}


ROWS: dict[str, tuple[dict[str, Any], Any, Dequantise, tuple[str, ...], dict[str, Any]]] = {
    "fp8 in blocks": (FP8 | {"weight_block_size": [128, 128]}, in_blocks, from_blocks, (), WIDE),
    "fp8 by tensors, some modules in 16 bit": (
        FP8 | SKIPPED,
        by_tensor,
        from_tensor,
        ("layers.0.mlp.", "layers.1.self_attn.k_proj."),
        {"family": "qwen2"},
    ),
    "fp8 by rows": (
        compressed("float-quantized", FLOATS, TOKENS),
        by_row,
        lambda h: (*unrounded(h)[:1], rounded),
        (),
        {},
    ),
    "fp8 by rows, inputs in 16 bit": (compressed("float-quantized", FLOATS, None), by_row, unrounded, (), {}),
    "gptq": (GPTQ | {"bits": 4, "group_size": 16, "desc_act": True}, gptq, from_gptq, (), {}),
    "gptq in 8 bit": (
        GPTQ | {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"},
        gptq_8,
        lambda held: from_gptq(held, 8, 0),
        (),
        {"family": "qwen2"},
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        awq,
        from_awq,
        (),
        {},
    ),
    "packed integers": (compressed("pack-quantized", GROUPS | {"group_size": 32}, None), packed, from_packed, (), {}),
    "packed integers, not symmetric, in any order": (
        compressed("pack-quantized", GROUPS | {"group_size": 16, "symmetric": False, "actorder": "group"}, None),
        packed_in_any_order,
        from_packed,
        (),
        {},
    ),
    "fp8 by tensors, static": (FP8 | {"activation_scheme": "static"}, given, from_given, (), {}),
}


HELD = ("awq", "packed integers")
"""The quick tier has both as weights that stay packed, and the first on two ranks."""


@pytest.mark.parametrize(
    ("row", "impl", "ranks"),
    [
        *(pytest.param(row, "native", 1, marks=pytest.mark.slow if row in HELD else ()) for row in ROWS),
        ("fp8 in blocks", "transformers", 1),
        ("awq", "native", 2),  # groups of 32 inputs, of which a rank of down_proj has one and a half
        pytest.param("awq", "transformers", 1, marks=pytest.mark.slow),
        pytest.param("awq", "transformers", 2, marks=pytest.mark.slow),
        pytest.param("gptq in 8 bit", "native", 2, marks=pytest.mark.slow),
        pytest.param("packed integers", "native", 2, marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_peft_over_the_same_base(
    tmp_path: Path, row: str, impl: str, ranks: int, request: pytest.FixtureRequest
) -> None:
    if row.startswith("fp8"):
        request.getfixturevalue("torch_operations")
    config, quantise, dequantise, skipped, model = ROWS[row]
    write_quantised(tmp_path / "base", config, quantise, skipped, **model)
    tensors = load_file(tmp_path / "base" / "model.safetensors")

    def weights(path: str) -> Any:
        return dequantise({n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")})

    def base() -> Any:
        return plain_twin(tmp_path / "base", weights)

    models = {name: with_adapter(tmp_path / name, base, i, **c) for i, (name, c) in enumerate(ADAPTERS.items())}
    close = 2e-2 if row.startswith("fp8") else 1e-4
    held_against_peft(tmp_path, {None: base(), **models}, close, model_impl=impl, tp_size=ranks)


@pytest.mark.parametrize("row", ["gptq", "packed integers, not symmetric, in any order"])
def test_ranks_do_not_divide_inputs_in_any_order(tmp_path: Path, row: str) -> None:
    config, quantise, _, skipped, model = ROWS[row]
    write_quantised(tmp_path / "base", config, quantise, skipped, **model)
    with pytest.raises(
        ConfigError, match=r"--tp-size 2: ranks do not divide the inputs of o_proj in .* orders inputs"
    ):
        EngineDriver(tmp_path / "base", {}, tp_size=2)


@pytest.mark.parametrize("impl", ["native", pytest.param("transformers", marks=pytest.mark.slow)])
def test_fp8_while_it_is_loaded(tmp_path: Path, impl: str) -> None:
    make_tiny_model(tmp_path / "base", "qwen3")

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
        for module in decoder_linears(model).values():
            module.weight.data = rounded(module.weight.data)
            round_at(module, rounded)
        return model

    models = {name: with_adapter(tmp_path / name, base, i, **c) for i, (name, c) in enumerate(ADAPTERS.items())}
    held_against_peft(tmp_path, {None: base(), **models}, 2e-2, model_impl=impl, quantization="fp8")


def gptq_32(name: str, weight: torch.Tensor) -> Tensors:
    ints = packed_integers.rounded(weight, 4, 32, symmetric=False, order=shuffled(weight.shape[1]))
    return packed_integers.pack_gptq(ints, 4)


PACKED = {
    "awq": (ROWS["awq"][0], awq, from_awq, {}),
    "gptq, any order": (GPTQ | {"bits": 4, "group_size": 32, "desc_act": True}, gptq_32, from_gptq, {}),
    "packed integers": (ROWS["packed integers"][0], packed, from_packed, {"family": "qwen2"}),
}
WHOLE_TILES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
OF_EACH_RANK = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
"""64 outputs and a group of inputs, at least, of two."""


@pytest.mark.parametrize(
    ("row", "ranks"),
    [
        *((row, 1) for row in PACKED),
        pytest.param("awq", 2, marks=pytest.mark.slow),
        pytest.param("packed integers", 2, marks=pytest.mark.slow),
    ],
)
def test_weights_that_stay_packed_err_as_bf16_does(tmp_path: Path, row: str, ranks: int) -> None:
    config, quantise, dequantise, model = PACKED[row]
    write_quantised(tmp_path / "base", config, quantise, **(WHOLE_TILES if ranks == 1 else OF_EACH_RANK), **model)
    tensors = load_file(tmp_path / "base" / "model.safetensors")

    def weights(path: str) -> Any:
        return dequantise({n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")})

    def base() -> Any:
        return plain_twin(tmp_path / "base", weights)

    models = {name: with_adapter(tmp_path / name, base, i, **c) for i, (name, c) in enumerate(ADAPTERS.items())}
    models = {None: base(), **models}
    adapters = {name: tmp_path / name for name in models if name}
    driver = EngineDriver(tmp_path / "base", adapters, page_size=4, dtype="bfloat16", tp_size=ranks)
    held = [m for m in driver.engine.runner._model.modules() if isinstance(m, Weight) and not hasattr(m, "weights")]
    assert held and all(isinstance(weight, Int4Weight) for weight in held)
    prompts = {name: clear_prompt(model)[0] for name, model in models.items()}
    rids = {
        name: driver.submit(prompt, name, max_new_tokens=16, return_logprob=True) for name, prompt in prompts.items()
    }
    driver.run()
    answers = {
        name: [(prompts[name] + driver.answers[rid].tokens, torch.tensor(driver.answers[rid].logprobs))]
        for name, rid in rids.items()
    }
    driver.close()
    found = judge(models, answers, "cpu", torch.bfloat16)
    assert found.error < 2 * found.theirs, "scales are rounded to bf16, too"
