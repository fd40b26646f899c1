"""Every number that is promised, for one GPU or several, beside the hardware's limit, the target and the best peer.

    python -m bench.gpu [--only decode streams …] [--tp-size N] [--out bench/results/gpu.json]

Llama-3.1-8B's dimensions, random weights, bf16; adapters on all seven projections with truly distinct random weights;
one engine for all rows (`base_only` and `shared` start others beside it, without LoRA). A row's limit comes from
bandwidths and rates measured in the same run. Peers: the better of vLLM 0.26.0 and SGLang 0.5.17 on the same kind of
machine.
With `--quantization` or `--kv-cache-dtype` limits count the bytes held; there are no targets, which are of 16 bit.
`--dims qwen3-30b-a3b --only experts` measures a mixture of experts, `--max-running-requests 256 --only large` batches
of 128 and 256. `--compare OLD.json` says at the end what is better or worse than in an earlier result. The last line
is JSON. `--dims tiny --device cpu` runs the same rows in seconds, to check that they run.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.common import environment, finish, say
from bench.compare import compare
from bench.gpu.arrivals import cold_rows, streams_rows
from bench.gpu.contexts import contexts_rows, large_rows, low_ranks_rows, prompts_rows, shared_rows
from bench.gpu.decode import base_only_rows, decode_rows
from bench.gpu.experts import experts_rows
from bench.gpu.hardware import copies_rows, kernels_rows, measure, touch_host_memory
from bench.gpu.idle import idle_rows
from bench.gpu.sampling import sampling_rows
from bench.gpu.setup import Bench, scratch_parent
from bench.gpu.sizes import SIZES, Adapters, Dims, MoeDims, write_model
from bench.gpu.swaps import fresh_rows, swap_rows
from bench.gpu.throughput import few_places_rows, many_rows, slora_rows, throughput_rows
from multilora import LLM
from multilora.attention.backends import auto_attention
from multilora.attention.base import AttentionShape
from multilora.attention.kv_dtypes import KV_DTYPES
from multilora.config import Config
from multilora.engine.scheduling.policy import POLICIES

ARENA_FRACTION = 0.6  # leaves room for the second engine and for what is measured below the engine

PARTS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "decode": decode_rows,
    "experts": experts_rows,
    "base_only": base_only_rows,
    "low_ranks": low_ranks_rows,
    "prompts": prompts_rows,
    "contexts": contexts_rows,
    "shared": shared_rows,
    "large": large_rows,
    "sampling": sampling_rows,
    "throughput": throughput_rows,
    "few_places": few_places_rows,
    "cold": cold_rows,
    "streams": streams_rows,
    "idle": idle_rows,
    "kernels": kernels_rows,
    "copies": copies_rows,
    "many": many_rows,
    "slora": slora_rows,
    "swap": swap_rows,
    "fresh": fresh_rows,
}
WEIGHT_BITS = {"fp8": 8.0, "bitsandbytes": 4 + 8 / 64}
"""Bits of one number, with its share of scales where they count, by --quantization."""

LARGE = ("large",)  # with --max-running-requests of the largest batch
NEED_CUDA = ("idle", "kernels", "copies")
ONE_DEVICE = ("kernels",)  # what they measure is a whole model's
OF_EXPERTS = ("experts",)  # of a mixture's dimensions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="ROWS", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--dims", choices=SIZES, default="llama-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tp-size", type=int, default=1, help="devices that share the model")
    parser.add_argument("--model-impl", choices=("auto", "native", "transformers"), default="auto")
    parser.add_argument("--quantization", choices=WEIGHT_BITS, help="hold the layers' weights in fewer bits")
    parser.add_argument("--kv-cache-dtype", choices=["auto", *KV_DTYPES], default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--lora-backend", default="auto")
    parser.add_argument("--disable-cuda-graph", action="store_true")
    parser.add_argument("--piecewise-cuda-graph-max-tokens", type=int)
    parser.add_argument("--chunked-prefill-size", type=int, default=2048, help="most prompt tokens in a step")
    parser.add_argument("--max-running-requests", type=int, help="rows of `large` need more than the others")
    parser.add_argument("--schedule-policy", choices=sorted(POLICIES), default=Config().schedule_policy)
    parser.add_argument("--out", help="also write the result to this file")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what is better or worse than there")
    args = parser.parse_args()
    old = json.loads(args.compare.read_text()) if args.compare else None
    if old is not None and "rows" not in old:
        parser.error(f"--compare {args.compare} has no rows")
    args.max_running_requests = args.max_running_requests or SIZES[args.dims][1].batch
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if args.tp_size > 1 and set(args.only or ()) & set(ONE_DEVICE):
        parser.error(f"with --tp-size {args.tp_size} there are no rows {', '.join(ONE_DEVICE)}")
    if set(args.only or ()) & set(OF_EXPERTS) and not isinstance(SIZES[args.dims][0], MoeDims):
        parser.error(f"--dims {args.dims} has no experts, which rows {', '.join(OF_EXPERTS)} are about")
    if set(args.only or ()) & set(LARGE) and not _measurable(LARGE[0], args):
        most = SIZES[args.dims][1].large_batches[-1]
        parser.error(f"rows {', '.join(LARGE)} need --max-running-requests {most}")
    parts = args.only or [part for part in PARTS if _measurable(part, args)]
    directory = Path(tempfile.mkdtemp(prefix="multilora-bench-", dir=scratch_parent()))
    try:
        result = run(directory, args, parts)
    finally:
        shutil.rmtree(directory)
    if old is not None:
        try:
            say("\n".join(compare(old, result)))
        except ValueError as e:  # what has been measured is not lost for it
            say(f"not compared with {args.compare}: {e}")
    finish(result, args.out)
    return 1 if result["failed"] else 0


def _measurable(part: str, args: argparse.Namespace) -> bool:
    if part in OF_EXPERTS and not isinstance(SIZES[args.dims][0], MoeDims):
        return False
    if part in LARGE and args.max_running_requests < SIZES[args.dims][1].large_batches[-1]:
        return False
    return (args.device == "cuda" or part not in NEED_CUDA) and (args.tp_size == 1 or part not in ONE_DEVICE)


def run(directory: Path, args: argparse.Namespace, parts: list[str]) -> dict[str, Any]:
    """Start the engine and measure part after part. A part that fails does not stop the others."""
    started = time.perf_counter()
    dims, work = SIZES[args.dims]
    result: dict[str, Any] = environment("transformers", "triton")
    if args.device == "cuda":
        result["host_memory_first_use_gb_s"] = round(touch_host_memory() / 1e9, 1)
    machine = measure(torch.device(args.device))
    result |= {
        "read_bandwidth_tb_s": machine.read / 1e12,
        "matmul_tflop_s": machine.matmul / 1e12,
        "link_gb_s": machine.link and machine.link / 1e9,
    }
    say(json.dumps(result))
    options: dict[str, Any] = {
        "device": args.device,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_running_requests": args.max_running_requests,
        "disable_radix_cache": True,
        "tp_size": args.tp_size,
        "quantization": args.quantization,
        "model_impl": args.model_impl,
        "kv_cache_dtype": args.kv_cache_dtype,
        "attention_backend": attention_backend(args, dims),
        "disable_cuda_graph": args.disable_cuda_graph,
        "piecewise_cuda_graph_max_tokens": args.piecewise_cuda_graph_max_tokens,
        "chunked_prefill_size": args.chunked_prefill_size,
        "schedule_policy": args.schedule_policy,
        "random_seed": 0,
    }
    model = write_model(directory / "model", dims, work.longest)
    result |= {"rows": [], "seconds": {}, "failed": {}}

    def start_other(**changes: Any) -> LLM:
        return LLM(model, **({"max_total_tokens": 2 * work.batch * work.longest_decode} | options | changes))

    with LLM(
        model, enable_lora=True, lora_backend=args.lora_backend, mem_fraction_static=ARENA_FRACTION, **options
    ) as llm:
        gc.collect()
        gc.freeze()  # as the engine does in a process of its own
        result["seconds"]["start"] = round(time.perf_counter() - started, 1)
        adapters = Adapters(directory, dims, machine.device)
        bits = WEIGHT_BITS.get(args.quantization, 16), 16 if args.kv_cache_dtype == "auto" else 8
        bench = Bench(llm, start_other, dims, work, machine, adapters, args.dims, args.tp_size, *bits)
        for part in parts:
            measure_part(bench, part, result)
    result["seconds"]["all"] = round(time.perf_counter() - started, 1)
    say(json.dumps(result["seconds"]))
    return result


def attention_backend(args: argparse.Namespace, dims: Dims) -> str:
    """By name what `auto` means, so that the start waits for kernels that are not compiled yet and none stand in for
    them."""
    if args.attention_backend != "auto":
        return str(args.attention_backend)
    shape = AttentionShape(dims.heads, dims.kv_heads, dims.head_dim, dims.head_dim**-0.5, None)
    kv_dtype = getattr(torch, KV_DTYPES.get(args.kv_cache_dtype, "bfloat16"))
    return auto_attention(torch.device(args.device), torch.bfloat16, kv_dtype, shape)[0]


def measure_part(bench: Bench, part: str, result: dict[str, Any]) -> None:
    started = time.perf_counter()
    try:
        result["rows"].extend(PARTS[part](bench))
    except Exception as error:  # noqa: BLE001 (a part that fails is reported; the others are still measured)
        traceback.print_exc()
        result["failed"][part] = repr(error)
    result["seconds"][part] = round(time.perf_counter() - started, 1)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
