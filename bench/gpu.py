"""Decode steps, throughput and cold starts on one GPU, beside the hardware's limit and the best peer.

    python -m bench.gpu [--only decode throughput cold] [--out bench/results/gpu.json]

Llama-3.1-8B's dimensions, random weights, bf16; adapters on all seven projections with truly distinct random weights;
one engine for all rows. A limit is the bytes that must move (weights, KV, adapters in use) over the read bandwidth
measured in the same run. Peers: the better of vLLM 0.26.0 and SGLang 0.5.17 on the same kind of machine.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.common import environment, finish, read_bandwidth, say
from multilora import LLM

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 32, 8, 128, 128256
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.o_proj": (HEADS * HEAD_DIM, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTER),
    "mlp.up_proj": (HIDDEN, INTER),
    "mlp.down_proj": (INTER, HIDDEN),
}
PROMPT, STEPS = 128, 64
GREEDY = {"temperature": 0, "ignore_eos": True}

# (row, batch, adapters in the batch, group, best peer's milliseconds)
DECODE = [
    ("LoRA unused, batch 1", 1, 0, "r16", 4.80),
    ("LoRA unused, batch 64", 64, 0, "r16", 5.94),
    ("batch 1, one rank-16", 1, 1, "r16", 7.76),
    ("batch 8, 8 distinct rank-16", 8, 8, "r16", 8.70),
    ("batch 32, 32 distinct rank-16", 32, 32, "r16", 10.2),
    ("batch 64, 64 distinct rank-16", 64, 64, "r16", 12.2),
    ("batch 64, one rank-16", 64, 1, "r16", 9.54),
    ("batch 64, 64 distinct, ranks 8/16/32/64", 64, 64, "mixed", 18.9),
]
# (row, adapters, group, best peer's output tokens per second)
THROUGHPUT = [
    ("LoRA unused", 0, "r16", 5150),
    ("one rank-16 adapter", 1, "r16", 3344),
    ("64 distinct rank-16", 64, "r16", 3153),
    ("64 distinct, ranks 8/16/32/64", 64, "mixed", 2430),
]
COLD = [(16, 142, 31), (64, 320, 32)]  # rank, best peer cold and warm, ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["decode", "throughput", "cold"])
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--lora-backend", default="auto")
    parser.add_argument("--disable-cuda-graph", action="store_true")
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    directory = Path(tempfile.mkdtemp(prefix="multilora-bench-"))
    try:
        finish(run(directory, args), args.out)
    finally:
        shutil.rmtree(directory)


def run(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    parts = args.only or ["decode", "throughput", "cold"]
    result: dict[str, Any] = environment("transformers", "triton")
    bandwidth = read_bandwidth(torch.device("cuda"), 1 << 32)
    result["read_bandwidth_tb_s"] = bandwidth / 1e12
    say(json.dumps(result))
    write_config(directory / "model")
    groups = {"r16": [16] * 64, "mixed": [8, 16, 32, 64] * 16}
    needed = {row[3] for row in DECODE if "decode" in parts} | {row[2] for row in THROUGHPUT if "throughput" in parts}
    start = time.perf_counter()
    paths = {}
    for group in sorted(needed):
        for i, rank in enumerate(groups[group]):
            paths[f"{group}-{i}"] = str(write_adapter(directory / f"{group}-{i}", rank, seed=i))
    say(f"wrote {len(paths)} adapters in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    llm = LLM(
        str(directory / "model"),
        lora_paths=paths,
        enable_lora=True,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_running_requests=64,
        disable_radix_cache=True,
        attention_backend=args.attention_backend,
        lora_backend=args.lora_backend,
        disable_cuda_graph=args.disable_cuda_graph,
        random_seed=0,
    )
    say(f"engine and {len(paths)} adapters up in {time.perf_counter() - start:.1f} s")
    with llm:
        if "decode" in parts:
            result["decode"] = [decode_row(llm, row, groups, bandwidth) for row in DECODE]
        if "throughput" in parts:
            result["throughput"] = [throughput_row(llm, row) for row in THROUGHPUT]
        if "cold" in parts:
            result["cold"] = [cold_row(llm, directory, *row) for row in COLD]
    return result


def decode_row(llm: LLM, row: tuple, groups: dict[str, list[int]], bandwidth: float) -> dict[str, Any]:
    """Milliseconds of one decode step: STEPS + 1 tokens minus 1 token, over STEPS."""
    name, batch, adapters, group, peer = row
    prompts, names = workload(batch, PROMPT, adapters, group)
    times = {}
    for tokens in (1, STEPS + 1):
        llm.generate(prompts, GREEDY | {"max_new_tokens": tokens}, lora_path=names)
        times[tokens] = min(timed(llm, prompts, names, tokens) for _ in range(3))
    step = (times[STEPS + 1] - times[1]) / STEPS * 1e3
    limit = decode_bytes(batch, groups[group][:adapters]) / bandwidth * 1e3
    say(f"{name:<44} {step:7.2f} ms   limit {limit:5.2f}   of limit {limit / step:4.0%}   best peer {peer:5.2f}")
    return {"row": name, "ms": step, "limit_ms": limit, "best_peer_ms": peer}


def throughput_row(llm: LLM, row: tuple) -> dict[str, Any]:
    name, adapters, group, peer = row
    prompts, names = workload(256, 512, adapters, group)
    llm.generate(prompts[:64], GREEDY | {"max_new_tokens": 4}, lora_path=names[:64])
    rate = 256 * 128 / timed(llm, prompts, names, 128)
    say(f"{name:<44} {rate:7.0f} output tokens/s   best peer {peer}")
    return {"row": name, "tokens_per_s": rate, "best_peer": peer}


def cold_row(llm: LLM, directory: Path, rank: int, peer_cold: float, peer_warm: float) -> dict[str, Any]:
    """Load call plus first token of an adapter never seen before, minus the first token of a warm one; medians."""
    cold, warm = [], []
    for i in range(5):
        path = write_adapter(directory / f"cold-{rank}-{i}", rank, seed=1000 + i)
        prompts, _ = workload(1, PROMPT, 0, "")
        start = time.perf_counter()
        llm.load_lora_adapter(f"cold-{rank}-{i}", str(path))
        llm.generate(prompts, GREEDY | {"max_new_tokens": 1}, lora_path=f"cold-{rank}-{i}")
        cold.append(time.perf_counter() - start)
        warm.append(timed(llm, prompts, [f"cold-{rank}-{i}"], 1))
        llm.unload_lora_adapter(f"cold-{rank}-{i}")
        shutil.rmtree(path)
    ms_cold, ms_warm = sorted(cold)[2] * 1e3, sorted(warm)[2] * 1e3
    say(f"first token, rank {rank}: cold {ms_cold:.1f} ms, warm {ms_warm:.1f}   best peer {peer_cold} / {peer_warm}")
    return {"rank": rank, "cold_ms": ms_cold, "warm_ms": ms_warm, "best_peer_ms": [peer_cold, peer_warm]}


def workload(requests: int, length: int, adapters: int, group: str) -> tuple[list[list[int]], list[str | None]]:
    generator = torch.Generator().manual_seed(requests)
    prompts = torch.randint(0, VOCAB, (requests, length), generator=generator).tolist()
    return prompts, [f"{group}-{i % adapters}" if adapters else None for i in range(requests)]


def timed(llm: LLM, prompts: list[list[int]], names: list[str | None], tokens: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    llm.generate(prompts, GREEDY | {"max_new_tokens": tokens}, lora_path=names)
    return time.perf_counter() - start


def decode_bytes(batch: int, ranks: list[int]) -> int:
    """What one step must read: the matrices, the KV of the mean context, the adapters in use."""
    widths = sum(a + b for a, b in SHAPES.values())
    weights = LAYERS * sum(a * b for a, b in SHAPES.values()) + HIDDEN * VOCAB
    kv = batch * (PROMPT + STEPS // 2) * LAYERS * 2 * KV_HEADS * HEAD_DIM
    return 2 * (weights + kv + LAYERS * widths * sum(ranks))


def write_config(path: Path) -> None:
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
    (path / "config.json").write_text(json.dumps(config))


def write_adapter(path: Path, rank: int, seed: int) -> Path:
    """A PEFT adapter with weights of its own."""
    path.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.partition(".")[2] for name in SHAPES],
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module, (width, out) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            for half, shape in (("lora_A", (rank, width)), ("lora_B", (out, rank))):
                weight = torch.randn(shape, generator=generator, device="cuda") / shape[1] ** 0.5 * 0.1
                tensors[f"{prefix}.{half}.weight"] = weight.to(torch.bfloat16)
    save_file({name: t.cpu() for name, t in tensors.items()}, path / "adapter_model.safetensors")
    return path


if __name__ == "__main__":
    main()
