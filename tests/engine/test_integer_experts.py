"""Mixtures whose experts are packed integers, under adapters in 16 bit: answers are those of transformers and PEFT.

Their model has the dequantised experts. What is held dequantised is held against them in fp32, token for token; what
stays packed in bf16, where errors may be twice those of theirs in bf16, and bit for bit against the same engine over
dequantised experts. Adapters act on attention, the router and
experts, on one rank and where two divide the experts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_integers
import pytest
import torch
from exactness import ask_for_all, judge, told
from fakes.engine_driver import EngineDriver
from fp8_definitions import compressed
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
)
from quantised import (
    EXPERT_ADAPTERS,
    VOCAB,
    Tensors,
    clear_prompt,
    held_against_peft,
    plain_twin,
    with_adapter,
    write_quantised,
)
from safetensors.torch import load_file

from multilora.engine.messages import MemoryTag, Sleep, WakeUp
from multilora.layers.weights.base import ExpertsWeight
from multilora.layers.weights.int4_experts import Int4Experts
from multilora.layers.weights.unpacked import UnpackedExperts

TAGS: list[MemoryTag] = ["weights", "kv_cache"]
TOKENS = 16
OTHERS = ("self_attn.", "shared_expert")
"""What some of the checkpoints have in 16 bit."""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gptq_in_order(name: str, weight: torch.Tensor) -> Tensors:
    ints = packed_integers.rounded(weight, 4, 32, symmetric=False)
    return packed_integers.pack_gptq(ints, 4) | {"bias": torch.zeros(len(weight))}


def inside(*layers: str) -> dict[str, Any]:
    """As Mixtral's checkpoints name what is quantised."""
    experts = [[f"block_sparse_moe.experts.{i}.{w}" for i in range(6)] for w in ("w1", "w2", "w3")]
    return {"modules_in_block_to_quantize": [list(layers), *experts]}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
TILES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXTRAL = TILES | {"family": "mixtral", "num_local_experts": 6}
QWEN2 = TILES | {"family": "qwen2_moe", "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
QWEN3 = TILES | {"family": "qwen3_moe", "moe_intermediate_size": 96}
IN_ORDER = GPTQ | {"bits": 4, "group_size": 32, "desc_act": False}
INTEGERS = compressed("pack-quantized", GROUPS | {"group_size": 32}, None)
GROUPED = GROUPS | {"group_size": 16, "symmetric": False, "actorder": "group"}
IGNORED = {"ignore": ["lm_head", "re:.*self_attn", "re:.*mlp.gate", "re:.*shared_expert.*"]}
Row = tuple[dict[str, Any], Any, Callable[[Tensors], Any], tuple[str, ...], dict[str, Any]]

PACKED: dict[str, Row] = {
    "qwen3_moe, awq": (AWQ | {"modules_to_not_convert": [".*self_attn"]}, awq, from_awq, OTHERS, QWEN3),
    "mixtral, gptq": (IN_ORDER | inside(), gptq_in_order, from_gptq, OTHERS, MIXTRAL),
    "qwen2_moe, packed integers": (INTEGERS | IGNORED, packed, from_packed, OTHERS, QWEN2),
}
ALL_LAYERS: dict[str, Row] = {
    "qwen3_moe, gptq, all": (IN_ORDER, gptq_in_order, from_gptq, (), QWEN3),
    "mixtral, gptq, all": (IN_ORDER | inside(*ATTENTION), gptq_in_order, from_gptq, (), MIXTRAL),
    "qwen2_moe, awq, all": (AWQ, awq, from_awq, ("shared_expert_gate",), QWEN2),
}
UNPACKED: dict[str, Row] = {
    "qwen3_moe, gptq, any order": (
        GPTQ
        | {
            "bits": 4,
            "group_size": 16,
            "desc_act": True,
            "modules_in_block_to_quantize": ["up_proj", "gate_proj", "down_proj"],
        },
        gptq,
        from_gptq,
        OTHERS,
        {"family": "qwen3_moe"},
    ),
    "mixtral, gptq in 8 bit": (
        GPTQ | {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"} | inside(),
        gptq_8,
        lambda held: from_gptq(held, 8, 0),
        OTHERS,
        {"family": "mixtral", "num_local_experts": 6},
    ),
    "qwen2_moe, packed integers in any order": (
        compressed("pack-quantized", GROUPED, None) | IGNORED,
        packed_in_any_order,
        from_packed,
        OTHERS,
        {"family": "qwen2_moe"},
    ),
}


def written(path: Path, row: Row, *, rounded: bool = False) -> Callable[[], Any]:
    """Write the checkpoint. Returns what makes transformers' model of it; rounded: of scales in bf16."""
    config, quantise, dequantise, skipped, model = row
    write_quantised(path / "base", config, quantise, skipped, **model)
    tensors = load_file(path / "base" / "model.safetensors")
    assert any(".experts." in name and t.dtype == torch.int32 for name, t in tensors.items())

    def weights(at: str) -> Any:
        held = {n.removeprefix(f"{at}."): t for n, t in tensors.items() if n.startswith(f"{at}.")}
        if rounded:
            held |= {n: t.bfloat16().float() for n, t in held.items() if n in ("scales", "weight_scale")}
        return dequantise(held)

    return lambda: plain_twin(path / "base", weights)


def experts_of(driver: EngineDriver) -> list[ExpertsWeight]:
    return [module for module in driver.engine.runner._model.modules() if isinstance(module, ExpertsWeight)]


GPTQ_ROW, AWQ_ROW = "mixtral, gptq", "qwen3_moe, awq"
"""The rows that are tried in every run: each on one rank and on two, but not in every test."""


def quick_or_slow(quick: bool, *values: object) -> object:
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("name", [quick_or_slow(name == GPTQ_ROW, name) for name in (*UNPACKED, *PACKED)])
def test_in_fp32_they_are_what_the_checkpoint_says(tmp_path: Path, name: str) -> None:
    base = written(tmp_path, (UNPACKED | PACKED)[name])
    models = {
        name: with_adapter(tmp_path / name, base, i, **c) for i, (name, c) in enumerate(EXPERT_ADAPTERS.items())
    }
    for size in (1, 2):
        held_against_peft(tmp_path, {None: base(), **models}, 1e-4, tp_size=size)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        quick_or_slow((name, ranks) == (GPTQ_ROW, 2), name, ranks)
        for name in (*PACKED, *ALL_LAYERS)
        for ranks in (1, 2)
    ],
)
def test_what_stays_packed_errs_as_bf16_does(tmp_path: Path, name: str, ranks: int) -> None:
    base = written(tmp_path, (PACKED | ALL_LAYERS)[name], rounded=True)
    models = {
        name: with_adapter(tmp_path / name, base, i, **c) for i, (name, c) in enumerate(EXPERT_ADAPTERS.items())
    }
    models = {None: base(), **models}
    adapters = {name: tmp_path / name for name in models if name}
    driver = EngineDriver(tmp_path / "base", adapters, page_size=4, dtype="bfloat16", tp_size=ranks)
    try:
        if ranks == 1:
            held = experts_of(driver)
            assert len(held) == 4 and all(isinstance(weight, Int4Experts) for weight in held)
        prompts = {name: clear_prompt(model)[0] for name, model in models.items()}
        rids = {
            name: driver.submit(prompt, name, max_new_tokens=TOKENS, return_logprob=True)
            for name, prompt in prompts.items()
        }
        driver.run()
        said = {name: driver.answers[rid] for name, rid in rids.items()}
    finally:
        driver.close()
    answers = {n: [(prompts[n] + one.tokens, torch.tensor(one.logprobs))] for n, one in said.items()}
    found = judge(models, answers, "cpu", torch.bfloat16)
    assert found.error < 2 * found.theirs


@pytest.mark.parametrize("name", [quick_or_slow(name == AWQ_ROW, name) for name in PACKED])
def test_what_stays_packed_says_what_dequantised_experts_say(tmp_path: Path, name: str) -> None:
    base = written(tmp_path, PACKED[name], rounded=True)
    for i, (adapter, config) in enumerate(EXPERT_ADAPTERS.items()):
        with_adapter(tmp_path / adapter, base, i, **config)
    said = {}
    for path in ("base", "base-plain"):
        adapters = {adapter: tmp_path / adapter for adapter in EXPERT_ADAPTERS}
        driver = EngineDriver(tmp_path / path, adapters, page_size=4, dtype="bfloat16")
        try:
            assert all(isinstance(w, Int4Experts) == (path == "base") for w in experts_of(driver))
            prompt = list(range(5, 24))
            rids = [
                ask_for_all(driver, prompt, a, vocab=VOCAB, max_new_tokens=TOKENS) for a in (None, *EXPERT_ADAPTERS)
            ]
            driver.run()
            said[path] = torch.cat([told(driver.answers[rid], VOCAB) for rid in rids])
        finally:
            driver.close()
    assert torch.equal(said["base"], said["base-plain"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [(GPTQ_ROW, Int4Experts), pytest.param("qwen3_moe, gptq, any order", UnpackedExperts, marks=pytest.mark.slow)],
)
def test_they_wake_up_as_they_were(tmp_path: Path, name: str, kind: type) -> None:
    """Discarded and read again."""
    base = written(tmp_path, (PACKED | UNPACKED)[name])
    with_adapter(tmp_path / "a", base, 0, **EXPERT_ADAPTERS["experts"])
    driver = EngineDriver(tmp_path / "base", {"a": tmp_path / "a"}, dtype="bfloat16")
    try:
        before = driver.complete(list(range(5, 24)), "a", max_new_tokens=6).tokens
        held = experts_of(driver)
        assert all(isinstance(weight, kind) for weight in held)
        driver.call(Sleep(call=0, level=2, mode="keep", tags=TAGS))
        assert not any(p.untyped_storage().nbytes() for weight in held for p in weight.parameters())
        driver.call(WakeUp(0, TAGS))
        assert driver.complete(list(range(5, 24)), "a", max_new_tokens=6).tokens == before
    finally:
        driver.close()
