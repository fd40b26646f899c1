"""Decode steps of a mixture of experts: without adapters, with adapters on attention, with adapters on all experts.

The limit of a step is its bytes at the read bandwidth measured in the same run: of the experts, those that its rows
take. Targets are for Qwen3-30B-A3B's dimensions on an H200.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.common import Row
from bench.gpu.decode import measured_step_ms
from bench.gpu.setup import Bench, scratch_parent
from bench.gpu.sizes import ExpertAdapters, MoeDims

DISTINCT, RANK = 16, 16
TARGETS = {"limit": 1.5, "attention": 1.2, "experts": 1.6}


def experts_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Ratios: of the step without adapters to its limit, and of the steps with adapters to that one."""
    dims, work = bench.dims, bench.work
    assert isinstance(dims, MoeDims)
    batch, targets = work.batch, TARGETS if bench.sizes == "qwen3-30b-a3b" else {}
    distinct = min(DISTINCT, batch)
    limit = bench.step_ms(batch, work.decode_prompt + work.decode_steps / 2, [])
    off = measured_step_ms(bench, [None] * batch)
    row = Row(f"decode, batch {batch}, mixture of experts, LoRA unused, of its limit", "ratio", targets.get("limit"))
    yield row.show(off / limit, 1.0, ms=off, limit_ms=limit)
    attention = [f"attention-{i}" for i in range(distinct)]
    bench.load(dict.fromkeys(attention, RANK))
    more = bench.dims.adapter_bytes(RANK) * distinct
    yield _row(bench, "attention", attention, off, limit, more, targets)
    experts = [f"experts-{i}" for i in range(distinct)]
    with TemporaryDirectory(dir=scratch_parent()) as directory:
        writer = ExpertAdapters(Path(directory), dims, bench.machine.device)
        bench.load(dict.fromkeys(experts, RANK), writer, block=1)  # some gigabytes each
    more = dims.expert_adapter_bytes(RANK, batch // distinct) * distinct
    yield _row(bench, "experts", experts, off, limit, more, targets)


def _row(
    bench: Bench, where: str, names: list[str], off: float, limit: float, more: float, targets: dict[str, float]
) -> dict[str, Any]:
    """The step whose rows take these adapters in turn, beside the one without. more: bytes of the adapters."""
    batch = bench.work.batch
    took = measured_step_ms(bench, [names[i % len(names)] for i in range(batch)])
    least = limit + more / bench.machine.read * 1e3
    row = Row(f"decode, batch {batch}, {len(names)} distinct rank-{RANK} on {where}, to unused", "ratio",
              targets.get(where))  # fmt: skip
    return row.show(took / off, None, ms=took, limit_ms=least)
