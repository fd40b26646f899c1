"""One batch over many adapters, on CPU: multilora beside PEFT's mixed batch and beside one adapter after another.

    python -m bench.cpu [--adapters 1 8 64] [--dtype float32] [--out bench/results/cpu.json]

A random Llama of about 100 M parameters, rank-16 adapters on all seven projections with distinct random weights, at
most 16 requests at a time (64 tokens in, 32 out, greedy), the same weights and prompts for all three. In fp32 every
engine's tokens are compared: a faster wrong answer does not count. In bf16, which CPUs with AMX multiply several
times as fast, they differ by rounding. All are warmed up; up to 16 requests the best of three runs counts.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import environment, finish, read_bandwidth, say
from multilora import LLM

BATCH, PROMPT, NEW, RANK = 16, 64, 32, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all three")
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="multilora-bench-"))
    try:
        finish(run(directory, args.adapters, args.dtype), args.out)
    finally:
        shutil.rmtree(directory)


def run(directory: Path, counts: list[int], dtype: str = "float32") -> dict[str, Any]:
    result: dict[str, Any] = environment("transformers", "peft")
    result["workload"] = f"{BATCH} at a time, {PROMPT} in, {NEW} out, rank {RANK} on 7 modules, {dtype}, greedy"
    model = make_model(directory / "model")
    make_adapters(model, directory, max(counts))
    parameters = sum(p.numel() for p in model.parameters())
    bandwidth = read_bandwidth(torch.device("cpu"))
    result |= {"parameters": parameters, "read_bandwidth_gb_s": bandwidth / 1e9, "threads": torch.get_num_threads()}
    say(json.dumps(result, indent=1))
    say(f"{'adapters':>8} {'multilora':>10} {'PEFT mixed':>11} {'one by one':>11}   tokens/s; in brackets: ratio")
    peft = load_peft(model.to(getattr(torch, dtype)), directory, max(counts))
    result["rows"] = []
    for count in counts:
        row = measure(directory, peft, count, parameters, bandwidth, dtype)
        result["rows"].append(row)
        ours = row["multilora"]
        say(
            f"{count:>8} {ours:>10.1f} {row['peft_mixed']:>7.1f} ({ours / row['peft_mixed']:.1f}x)"
            f" {row['one_by_one']:>7.1f} ({ours / row['one_by_one']:.1f}x)   decode step {row['step_ms']:.1f} ms, "
            f"floor {row['floor_ms']:.1f} ms, all tokens equal: {row['tokens_equal']}"
        )
    return result


def measure(directory: Path, peft: Any, count: int, parameters: int, bandwidth: float, dtype: str) -> dict[str, Any]:
    """Output tokens per second of the three, over the same requests."""
    requests = max(BATCH, count)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 16000, (requests, PROMPT), generator=generator)
    names = [f"a{i % count}" for i in range(requests)]
    repeats = 3 if requests == BATCH else 1
    ours, mine, step = run_multilora(directory, prompts, names, count, repeats, dtype)
    generate(peft, prompts[:BATCH], adapter_names=names[:BATCH])  # warm-up, as ours has had
    mixed, theirs = max((run_peft_mixed(peft, prompts, names) for _ in range(repeats)), key=lambda r: r[0])
    one, others = max((run_one_by_one(peft, prompts, names) for _ in range(repeats)), key=lambda r: r[0])
    adapter_bytes = Path(directory / "a0" / "adapter_model.safetensors").stat().st_size
    itemsize = getattr(torch, dtype).itemsize
    floor = itemsize * (parameters + min(BATCH, count) * adapter_bytes / 4) / bandwidth  # files are in fp32
    return {
        "adapters": count,
        "requests": requests,
        "multilora": ours,
        "peft_mixed": mixed,
        "one_by_one": one,
        "step_ms": step * 1e3,
        "floor_ms": floor * 1e3,
        "tokens_equal": mine == theirs == others,
    }


def run_multilora(
    directory: Path, prompts: torch.Tensor, names: list[str], count: int, repeats: int, dtype: str
) -> tuple[float, list[list[int]], float]:
    """(tokens per second, tokens, seconds of a decode step)"""
    paths = {f"a{i}": str(directory / f"a{i}") for i in range(count)}
    with LLM(
        str(directory / "model"),
        dtype=dtype,
        lora_paths=paths,
        skip_tokenizer_init=True,
        max_running_requests=BATCH,
        disable_radix_cache=True,
    ) as llm:

        def timed(requests: int, tokens: int) -> tuple[float, list[list[int]]]:
            start = time.perf_counter()
            sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
            answers = llm.generate(prompts[:requests].tolist(), sampling, lora_path=names[:requests])
            return time.perf_counter() - start, [a.token_ids for a in answers]

        timed(BATCH, NEW)  # warm-up
        seconds, tokens = min(timed(len(names), NEW) for _ in range(repeats))
        whole, prefill = (min(timed(BATCH, n)[0] for _ in range(3)) for n in (NEW, 1))
    return len(names) * NEW / seconds, tokens, (whole - prefill) / (NEW - 1)


@torch.inference_mode()
def run_peft_mixed(peft: Any, prompts: torch.Tensor, names: list[str]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens: list[list[int]] = []
    for i in range(0, len(names), BATCH):
        tokens += generate(peft, prompts[i : i + BATCH], adapter_names=names[i : i + BATCH])
    return len(names) * NEW / (time.perf_counter() - start), tokens


@torch.inference_mode()
def run_one_by_one(peft: Any, prompts: torch.Tensor, names: list[str]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens: list[list[int]] = [[] for _ in names]
    for name in dict.fromkeys(names):
        rows = [i for i, n in enumerate(names) if n == name]
        peft.set_adapter(name)
        for i, answer in zip(rows, generate(peft, prompts[rows]), strict=True):
            tokens[i] = answer
    return len(names) * NEW / (time.perf_counter() - start), tokens


@torch.inference_mode()
def generate(peft: Any, prompts: torch.Tensor, **extra: Any) -> list[list[int]]:
    out = peft.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        **extra,
    )
    return out[:, PROMPT:].tolist()


def make_model(path: Path) -> LlamaForCausalLM:
    """About 100 M parameters; no EOS, so that every answer has the same length."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


def make_adapters(model: LlamaForCausalLM, directory: Path, count: int) -> None:
    """PEFT writes one; the others are copies with weights of their own."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    peft = get_peft_model(model, config)
    peft.save_pretrained(directory / "a0")
    peft.unload()
    shapes = load_file(directory / "a0" / "adapter_model.safetensors")
    for i in range(count):
        target = directory / f"a{i}"
        if i:
            shutil.copytree(directory / "a0", target)
        generator = torch.Generator().manual_seed(i)
        weights = {
            name: torch.randn(w.shape, generator=generator) / w.shape[1] ** 0.5 * 0.5 for name, w in shapes.items()
        }
        save_file(weights, target / "adapter_model.safetensors")


def load_peft(model: LlamaForCausalLM, directory: Path, count: int) -> Any:
    kind = {"autocast_adapter_dtype": False}  # adapters in the model's dtype, as ours are
    peft = PeftModel.from_pretrained(model, directory / "a0", adapter_name="a0", **kind)
    for i in range(1, count):
        peft.load_adapter(directory / f"a{i}", adapter_name=f"a{i}", **kind)
    return peft.eval()


if __name__ == "__main__":
    main()
