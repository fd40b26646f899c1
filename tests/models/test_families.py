"""Every family against transformers, in fp32: full and chunked prefill, decode, and steps that mix them.

Covers `llama.py`, `mlp.py`, `mistral.py`, `qwen2.py`, `qwen3.py`, `mixtral.py`, `qwen2_moe.py`, `qwen3_moe.py` too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_tiny_model
from loaded_model import loaded_model
from paged_driver import Driver, Sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from multilora.models.base import CausalLM

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-sharded": ("llama", {"max_shard_size": "60KB"}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama3-rope": ("llama3", {}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN}),
    "mistral-window": ("mistral", {}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 12}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-unnormalised": ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
    "qwen3-moe-some-layers": (
        "qwen3_moe",
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CausalLM]:
    family, overrides = CASES[request.param]
    path: Path = tmp_path_factory.mktemp(request.param)
    reference = make_tiny_model(path, family, **overrides)
    return reference, loaded_model(path)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(reference: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([tokens], device=reference.device)).logits[0]


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_full_prefill(pair: tuple[Any, CausalLM]) -> None:
    reference, model = pair
    tokens = prompt(41)
    [got] = Driver(model).step([(Sequence(tokens), 41)])
    check(got, expected(reference, tokens))


@pytest.mark.parametrize("chunks", [(4, 8, 16, 13), (1, 40), (7, 1, 1, 2, 30), (39, 2)])
def test_chunked_prefill(pair: tuple[Any, CausalLM], chunks: tuple[int, ...]) -> None:
    reference, model = pair
    driver, seq = Driver(model), Sequence(prompt(41))
    got = torch.cat([driver.step([(seq, n)])[0] for n in chunks])
    check(got, expected(reference, seq.tokens))


def test_token_by_token(pair: tuple[Any, CausalLM]) -> None:
    reference, model = pair
    driver, seq = Driver(model), Sequence(prompt(30))
    got = torch.cat([driver.step([(seq, 1)])[0] for _ in range(30)])
    check(got, expected(reference, seq.tokens))


def test_mixed_batches(pair: tuple[Any, CausalLM]) -> None:
    """Decode and prefill of sequences of very different lengths in one step, pages interleaved."""
    reference, model = pair
    driver = Driver(model)
    seqs = [Sequence(prompt(n, seed=n)) for n in (50, 9, 33, 17)]
    plan = [(20, 1, 0, 5), (1, 1, 8, 1), (10, 0, 1, 1), (1, 1, 1, 1), (1, 1, 20, 1), (17, 5, 3, 8)]
    got: list[list[torch.Tensor]] = [[] for _ in seqs]
    for counts in plan:
        work = [(i, n) for i, n in enumerate(counts) if n]
        for (i, _), logits in zip(work, driver.step([(seqs[i], n) for i, n in work]), strict=True):
            got[i].append(logits)
    for seq, parts in zip(seqs, got, strict=True):
        check(torch.cat(parts), expected(reference, seq.tokens)[: seq.done])


GPU_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama3", {"head_dim": 128}),
    "mistral-window": ("mistral", {"head_dim": 64}),
    "qwen2": ("qwen2", {"hidden_size": 512}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "mixtral": ("mixtral", {"head_dim": 64}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 128, "moe_intermediate_size": 64}),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ["flashinfer", "torch"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_bf16_on_a_gpu(case: str, attention: str, tmp_path: Path) -> None:
    """Our bf16 logits are as near to fp32 as transformers' own bf16 logits are, prefill, decode and mixtures."""
    family, overrides = GPU_CASES[case]
    make_tiny_model(tmp_path, family, **overrides).bfloat16().save_pretrained(tmp_path)
    seqs = [Sequence(prompt(n, seed=n)) for n in (50, 9, 33, 17)]
    theirs, exact = (
        torch.cat([expected(reference, seq.tokens).float() for seq in seqs])
        for kind in (torch.bfloat16, torch.float32)
        for reference in [AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind).cuda().eval()]
    )
    model = loaded_model(tmp_path, device="cuda")
    assert model.config.dtype == torch.bfloat16
    driver = Driver(model, attention)
    got: list[list[torch.Tensor]] = [[] for _ in seqs]
    for counts in [(20, 1, 0, 5), (1, 1, 8, 1), (10, 0, 1, 1), (1, 1, 1, 1), (1, 1, 20, 1), (17, 5, 3, 8)]:
        work = [(i, n) for i, n in enumerate(counts) if n]
        for (i, _), logits in zip(work, driver.step([(seqs[i], n) for i, n in work]), strict=True):
            got[i].append(logits)
    ours = torch.cat([part for parts in got for part in parts])
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()
