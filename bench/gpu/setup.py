"""What every row starts from: one engine, its adapters, and the limits of the machine as measured in this run."""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.common import Row, synchronize
from bench.gpu.sizes import Adapters, Dims, Work
from multilora import LLM
from multilora.engine.messages import AdapterInfo

GREEDY = {"temperature": 0, "ignore_eos": True}
TARGETS_OF_RANKS = {
    2: {
        "decode, batch 1, LoRA unused": 2.6,
        "decode, batch 64, LoRA unused": 3.6,
        "decode, batch 64, 64 distinct rank-16": 4.7,
        "decode, batch 64, 64 distinct, ranks 8/16/32/64": 5.8,
    },
    4: {
        "decode, batch 1, LoRA unused": 2.0,
        "decode, batch 64, LoRA unused": 2.7,
        "decode, batch 64, 64 distinct rank-16": 3.6,
        "decode, batch 64, 64 distinct, ranks 8/16/32/64": 4.3,
    },
}
"""Milliseconds by --tp-size and row, for Llama-3.1-8B's dimensions."""

BLOCK = 32  # adapters that lie on disk at a time


@dataclass(frozen=True)
class Machine:
    """The hardware's limits in bytes or operations per second. link: from pinned host memory to the device."""

    device: torch.device
    read: float
    matmul: float
    link: float | None  # None: there is none


@dataclass(frozen=True)
class Bench:
    """What every row needs. start_other: makes another engine, with LoRA off and other options; sizes: the name of
    dims and work; tp_size: how many devices share the model; weight_bits, kv_bits: of a number in layers and in the
    KV cache; infos: every loaded adapter by name."""

    llm: LLM
    start_other: Callable[..., LLM]
    dims: Dims
    work: Work
    machine: Machine
    adapters: Adapters
    sizes: str
    tp_size: int = 1
    weight_bits: float = 16
    kv_bits: int = 16
    infos: dict[str, AdapterInfo] = field(default_factory=dict)

    def load(self, ranks: dict[str, int], adapters: Adapters | None = None, block: int = BLOCK) -> None:
        """Write and load adapters, name → rank. One block is written while another is loaded; then its files are
        deleted, because the engine keeps what it has loaded in host memory. adapters: what writes them."""
        names = list(ranks)
        blocks = [{name: ranks[name] for name in names[i : i + block]} for i in range(0, len(names), block)]
        with ThreadPoolExecutor(1) as writer:
            for paths in writer.map((adapters or self.adapters).write_all, blocks):
                self.infos.update(self.llm.load_lora_adapters(paths))
                for path in paths.values():
                    shutil.rmtree(path)

    def load_group(self, group: str) -> list[str]:
        """Names of the group's adapters, loaded if they are not."""
        ranks = {f"{group}-{i}": rank for i, rank in enumerate(self.work.ranks(group))}
        self.load({name: rank for name, rank in ranks.items() if name not in self.infos})
        return list(ranks)

    def row(self, name: str, unit: str, target: float | None = None, best_peer: float | None = None) -> Row:
        """Targets and peers are those of one model and workload in 16 bit on one device; others are in
        `TARGETS_OF_RANKS`."""
        if self.sizes != "llama-8b" or (self.weight_bits, self.kv_bits) != (16, 16):
            return Row(name, unit)
        if self.tp_size > 1:
            return Row(name, unit, TARGETS_OF_RANKS.get(self.tp_size, {}).get(name))
        return Row(name, unit, target, best_peer)

    def step_ms(self, batch: int, context: float, adapters: list[int]) -> float:
        """The least milliseconds of a decode step: the bytes of one device at the measured bandwidth. Collectives are
        not in it."""
        bits = {"weight_bits": self.weight_bits, "kv_bits": self.kv_bits}
        return self.dims.step_bytes(batch, context, adapters, self.tp_size, **bits) / self.machine.read * 1e3

    def prompts(self, count: int, length: int) -> list[list[int]]:
        random = torch.Generator().manual_seed(count)
        return torch.randint(2, self.dims.vocab, (count, length), generator=random).tolist()

    def timed(
        self, prompts: list[list[int]], names: Sequence[str | None], tokens: int, llm: LLM | None = None
    ) -> float:
        """Seconds of one closed batch with answers of `tokens` tokens."""
        synchronize(self.machine.device)
        start = time.perf_counter()
        (llm or self.llm).generate(prompts, GREEDY | {"max_new_tokens": tokens}, lora_path=names)
        return time.perf_counter() - start

    def adapter_loads(self) -> int:
        """How many adapters have been copied to the device so far."""
        return sum(a.loads for a in self.llm.stats().adapters)


def scratch_parent(nbytes: int = 16 << 30) -> Path | None:
    """A file system in memory, if there is one with `nbytes` free, so that no disk takes part; None: the default."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > nbytes else None
