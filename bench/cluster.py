"""Output tokens a second of N real replicas behind one address, against N times what one does.

    python -m bench.cluster --replicas 1 2 [--device cuda] [--seconds 30] [--out bench/results/cluster.json]

Needs the extra `ray`; starts Ray Serve on this machine. On CUDA each replica has a GPU of its own and Llama-3.1-8B's
dimensions with dummy weights, and 64 adapters of rank 16 with distinct random weights; on a CPU (`--device cpu`) they
have the bundled model and its adapters under 64 names, and share the cores, so that N do not do N times as much.
Clients keep 64 requests per replica under way all the time, each on the adapter whose turn it is. After `--warm`
seconds, what all replicas generate in `--seconds` is counted, by their own metrics. The aim is 0.95 N.
"""

import argparse
import asyncio
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cluster_client import GENERATED, Cluster, Timed, client_of, ended, generate, ray_here
from bench.common import Row, environment, finish
from bench.gpu.setup import scratch_parent
from bench.gpu.sizes import SIZES, Adapters, write_model
from multilora.demo import adapter_paths

ADAPTERS = 64
RANK = 16
AIM = 0.95


@dataclass(frozen=True)
class Work:
    """prompt, answer: tokens; at_a_time: requests for each replica; vocab: of the prompts' random tokens."""

    prompt: int
    answer: int
    at_a_time: int
    vocab: int


WORK = {"cuda": Work(512, 128, 64, 128256), "cpu": Work(24, 16, 8, 300)}


def contents(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """What cluster.yaml would say."""
    work = WORK[args.device]
    serve: dict[str, Any] = {
        "device": args.device,
        "skip_tokenizer_init": True,
        "max_running_requests": work.at_a_time,
        "disable_radix_cache": True,
        "tp_size": args.tp_size,
        "random_seed": 0,
        "lora_device_bytes": args.device_bytes,
        "lora_host_bytes": args.host_bytes,
        "drain_seconds": 5,
    }
    if args.device == "cuda":
        serve |= {"model_path": write_model(directory / "model", SIZES[args.dims][0]), "load_format": "dummy"}
    return {
        "state_dir": str(directory / "state"),
        "port": args.port,
        "ingresses": args.ingresses,
        "cpus": 0.1,
        "serve": serve,
    }


def adapters(args: argparse.Namespace, directory: Path) -> Mapping[str, Path]:
    """Name → directory, all written."""
    names = [f"adapter-{i}" for i in range(ADAPTERS)]
    if args.device == "cpu":
        return dict(zip(names, itertools.cycle(adapter_paths().values()), strict=False))
    dims = SIZES[args.dims][0]
    written = Adapters(directory, dims, torch.device("cpu")).write_all(dict.fromkeys(names, RANK))
    return {name: Path(path) for name, path in written.items()}


async def keep_busy(cluster: Cluster, work: Work, at_a_time: int, warm: float, seconds: float) -> dict[str, Any]:
    """So many requests under way until the time is over. Returns what was generated in `seconds`, after `warm`."""
    numbers, timed, rng = itertools.count(), list[Timed](), random.Random(0)
    prompts = [[rng.randrange(2, work.vocab) for _ in range(work.prompt)] for _ in range(ADAPTERS)]
    async with client_of(cluster) as client:

        async def ask_on() -> Timed:
            while True:
                number = next(numbers)
                prompt = [2 + number % (work.vocab - 2), *prompts[number % ADAPTERS][1:]]
                timed.append(await generate(client, prompt, f"adapter-{number % ADAPTERS}", work.answer))

        tasks = {asyncio.create_task(ask_on()) for _ in range(at_a_time)}
        await _unless_failed(tasks, warm)
        before, start = await asyncio.to_thread(cluster.samples, GENERATED), time.monotonic()
        await _unless_failed(tasks, seconds)
        after, end = await asyncio.to_thread(cluster.samples, GENERATED), time.monotonic()
        await ended(tasks, 0)
    by_replica = {name: (after[name] - before.get(name, 0.0)) / (end - start) for name in after}
    return {
        "tokens_s": sum(by_replica.values()),
        "client_tokens_s": sum(one.tokens for one in timed if start <= one.ended < end) / (end - start),
        "requests": sum(start <= one.ended < end for one in timed),
        "by_replica": dict(sorted(by_replica.items())),
        "latency_p50_s": sorted(one.ended - one.sent for one in timed)[len(timed) // 2] if timed else 0.0,
    }


async def _unless_failed(tasks: set["asyncio.Task[Timed]"], seconds: float) -> None:
    """Wait so long. Raises the error of a task that has ended before."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """A row for each number of replicas, the fewest first."""
    work, result = WORK[args.device], environment("ray", "transformers")
    cluster = Cluster(contents(args, directory), args.start_seconds)
    result |= {"rows": [], "start_s": {}}
    each = 0.0
    for number, replicas in enumerate(sorted(args.replicas)):
        result["start_s"][replicas] = round(cluster.scale(replicas), 1)
        if not number:
            cluster.load(adapters(args, directory))
        at_a_time = work.at_a_time * replicas
        found = asyncio.run(keep_busy(cluster, work, at_a_time, args.warm, args.seconds))
        each = each or found["tokens_s"] / replicas
        row = Row(f"output of {replicas} replicas, {ADAPTERS} adapters", "tokens/s", AIM * each * replicas)
        result["rows"].append(row.show(found["tokens_s"], parts_of_n=found["tokens_s"] / (each * replicas), **found))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=list(WORK), default="cuda")
    parser.add_argument("--dims", choices=SIZES, default="llama-8b", help="on CUDA")
    parser.add_argument("--tp-size", type=int, default=1, help="GPUs of each replica")
    parser.add_argument("--ingresses", type=int, default=1)
    parser.add_argument("--warm", type=float, default=15.0, help="seconds that are not counted")
    parser.add_argument("--seconds", type=float, default=30.0, help="that are")
    parser.add_argument("--start-seconds", type=float, default=300.0, help="for replicas to start")
    parser.add_argument("--device-bytes", default="16GB", help="--lora-device-bytes of each replica")
    parser.add_argument("--host-bytes", default="16GB", help="--lora-host-bytes of each replica")
    parser.add_argument("--port", type=int, default=18_400)
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    if args.device == "cuda" and torch.cuda.device_count() < max(args.replicas) * args.tp_size:
        parser.error(f"{max(args.replicas)} replicas need as many GPUs, times --tp-size")
    directory = Path(tempfile.mkdtemp(prefix="multilora-bench-", dir=scratch_parent()))
    try:
        with ray_here():
            result = measure(args, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    finish(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
