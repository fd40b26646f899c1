"""Models that ranks divide among them: the logits of one rank, from weights of which each rank has read its part."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_file import Counted
from fakes.models import FAMILIES, make_tiny_model
from packed_integers import pack_gptq, rounded
from quantised import write_quantised
from safetensors import safe_open

from multilora.attention.backends import make_attention
from multilora.batch import AttentionMeta
from multilora.distributed.group import SINGLE, Group, join
from multilora.errors import ConfigError
from multilora.layers.context import ForwardContext
from multilora.layers.experts import Experts
from multilora.models import weights
from multilora.models.base import CausalLM
from multilora.models.load import make_model

CPU = torch.device("cpu")
TOKENS = 20


def on_ranks(path: Path, size: int, function: Callable[[CausalLM], Any], dtype: str = "auto") -> list[Any]:
    """What the function says of each rank's model."""
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        group = join(str(path / f"meeting {size}"), rank, size, CPU, 30.0)
        found[rank] = function(loaded(path, group, dtype))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def loaded(path: Path, group: Group, dtype: str = "auto") -> CausalLM:
    model = make_model(str(path), device=CPU, group=group, dtype=dtype)
    model.load(str(path), load_format="auto", revision=None, seed=0)
    return model


@torch.inference_mode()
def logits(model: CausalLM) -> torch.Tensor:
    """Of every position of one prompt."""
    layout = model.kv_layout(TOKENS)
    attention = make_attention("torch", layout.views(torch.zeros(1, layout.page_bytes, dtype=torch.uint8)),
                               model.attention_shape)  # fmt: skip
    rows = torch.arange(TOKENS)
    zeros = torch.zeros_like(rows)
    attention.prepare(AttentionMeta((TOKENS,), (TOKENS,), torch.zeros(1, 1, dtype=torch.int64), zeros, rows))
    ctx = ForwardContext(attention, None)
    return model.logits(model(model.embed(rows * 5, ctx), rows, ctx), ctx)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits(tmp_path: Path, family: str, tied: bool) -> None:
    """On four ranks each of the two KV heads lies on two."""
    make_tiny_model(tmp_path, family, tie_word_embeddings=tied)
    expected = logits(loaded(tmp_path, SINGLE))
    for size in (2, 4):
        first, *others = on_ranks(tmp_path, size, logits)
        torch.testing.assert_close(first, expected, atol=2e-5, rtol=1e-5)
        assert all(torch.equal(other, first) for other in others), "not a bit may differ: each rank samples"


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_reads_what_it_holds_and_nothing_else(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_model(tmp_path, "qwen2")
    reads: dict[int, dict[str, int]] = {}

    def opened(file: Path) -> Counted:
        read = reads.setdefault(threading.get_ident(), {})
        return Counted(safe_open(file, framework="pt", device="cpu"), read)

    monkeypatch.setattr(weights, "open_file", opened)
    held = on_ranks(tmp_path, size, lambda model: (threading.get_ident(), model.weight_bytes))
    whole = {}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, not a dict
            whole[name] = file.get_tensor(name).nbytes
    for ident, nbytes in held:
        assert reads[ident].keys() == whole.keys()
        assert sum(reads[ident].values()) <= nbytes, "the rest is padding of the vocabulary"
    for name, nbytes in whole.items():
        read = [reads[ident][name] for ident, _ in held]
        if "norm" in name or name.endswith(("o_proj.bias", "down_proj.bias")):
            assert read == [nbytes] * size
        elif "k_proj" in name or "v_proj" in name:
            assert read == [nbytes // 2] * size, "one of two KV heads"
        elif "embed_tokens" in name or "lm_head" in name:
            assert sum(read) == nbytes
        else:
            assert read == [nbytes // size] * size, name


def test_a_model_that_cannot_be_divided_is_refused_before_its_weights(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Three(type(SINGLE)):
        size = 3

    with pytest.raises(ConfigError, match="--tp-size 3: q_proj, k_proj, v_proj: 4 x 16 columns cannot be divided"):
        make_model(str(tmp_path), device=CPU, group=Three())


def test_ranks_divide_fp8(tmp_path: Path) -> None:
    """Each holds its part of a matrix, with the scales of the blocks that this is."""

    def in_blocks(path: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scales = torch.rand(-(-weight.shape[0] // 16), -(-weight.shape[1] // 16)) + 0.5
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scales}

    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    write_quantised(tmp_path, config, in_blocks, family="llama")

    def parts(model: CausalLM) -> dict[str, torch.Tensor]:
        return {name: model.base_weight(1, name)[0] for name in ("q_proj", "up_proj", "down_proj", "o_proj")}

    whole = parts(loaded(tmp_path, SINGLE))
    held = on_ranks(tmp_path, 2, parts)
    for name, dim in (("q_proj", 0), ("up_proj", 0), ("down_proj", 1), ("o_proj", 1)):
        assert torch.equal(torch.cat([part[name] for part in held], dim=dim), whole[name]), name


@pytest.mark.parametrize("kind", ["fp8", "gptq"])
def test_ranks_read_and_hold_their_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Whole ones, with their scales, and nothing of those of others."""

    def in_blocks(path: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scales = torch.rand(-(-weight.shape[0] // 16), -(-weight.shape[1] // 16)) + 0.5
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": scales}

    def gptq(path: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return pack_gptq(rounded(weight, 4, 32, symmetric=False), 4)

    experts = ["gate_proj", "up_proj", "down_proj"]
    config, quantise, each = {
        "fp8": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, in_blocks, 2),
        "gptq": (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "modules_in_block_to_quantize": experts},
            gptq,
            4,
        ),
    }[kind]
    skipped = ("self_attn.",) if kind == "gptq" else ()
    write_quantised(tmp_path, config, quantise, skipped, family="qwen3_moe", moe_intermediate_size=64)
    reads: dict[int, dict[str, int]] = {}

    def opened(file: Path) -> Counted:
        read = reads.setdefault(threading.get_ident(), {})
        return Counted(safe_open(file, framework="pt", device="cpu"), read)

    def parts(model: CausalLM) -> tuple[int, list[torch.Tensor]]:
        experts = [module for module in model.modules() if isinstance(module, Experts)][1]
        weights = (experts.gate_up_proj, experts.down_proj)
        found = [torch.stack([w.dequantised(w.rows_of(e)) for e in range(w.experts)]) for w in weights]
        return threading.get_ident(), found

    dtype = "bfloat16" if kind == "gptq" else "auto"
    _, whole = parts(loaded(tmp_path, SINGLE, dtype))
    monkeypatch.setattr(weights, "open_file", opened)
    held = on_ranks(tmp_path, 2, parts, dtype)
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([found[i] for _, found in held]), expected)
    for rank, (ident, _) in enumerate(held):
        read = {name for name in reads[ident] if ".experts." in name}
        own = {f".experts.{number}." for number in range(3 * rank, 3 * rank + 3)}
        assert len(read) == 2 * 3 * 3 * each and all(any(at in name for at in own) for name in read)
