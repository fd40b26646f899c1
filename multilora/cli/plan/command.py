"""Runs `multilora plan`: a table, JSON, a picture; exit code out. Called by `__main__.py`."""

import dataclasses
import json
import sys
from pathlib import Path

from multilora.cli.plan.args import PlanArgs
from multilora.errors import ConfigError
from multilora.memory.plan import format_bytes
from multilora.planner.planner import RatePoint, ServingPlan, Workload, plan
from multilora.planner.plot import plot

BOUNDS = {
    "slots": "every step has --max-running-requests requests",
    "memory": "the arena holds no more requests",
    "adapters": "adapters take turns on the device",
}


def run(args: PlanArgs) -> int:
    """Write the plan and return the exit code: 1 if the rate that was asked about is not served in time. Raises
    ConfigError, ModelUnsupported, OutOfMemory."""
    workload = Workload(**args.question)
    found = plan(workload)
    if args.plot is not None:
        try:
            Path(args.plot).write_text(plot(found), encoding="utf-8")
        except OSError as e:
            raise ConfigError(f"--plot {args.plot}: {e.strerror}") from None
    sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=2) + "\n" if args.json else _text(found))
    late = workload.rps is not None and workload.rps > found.breaks_at
    return int(late)


def _text(plan: ServingPlan) -> str:
    w = plan.workload
    on_host = "" if plan.host_adapters is None else f", {plan.host_adapters:,} fit the host memory given"
    gpus = f"one {w.gpu}" if w.tp_size == 1 else f"{w.tp_size} × {w.gpu}"
    measured = "" if plan.measured else " (nobody has measured it: from the data sheet; ±30 %)"
    each = "" if w.tp_size == 1 else " on each"
    lines = [
        f"{w.model_path} on {gpus}{measured}",
        f"{w.adapters} adapters of rank {w.rank}, {w.prompt} tokens in, {w.answer} out",
        "",
        f"  weights        {format_bytes(plan.weights_bytes)}{each}",
        f"  arena          {format_bytes(plan.arena_bytes)}: {plan.kv_tokens:,} tokens of KV without adapters{each}",
        f"  one adapter    {format_bytes(plan.adapter_bytes)}, copied to the GPU in {plan.copy_seconds * 1e3:.2g} ms",
        f"  on the device  {min(plan.device_adapters, w.adapters):,} of {w.adapters:,} adapters beside "
        f"{w.max_running_requests} running requests ({plan.device_adapters:,} would fit)",
        f"  in host memory {format_bytes(plan.host_bytes_needed)} for all{on_host}",
        f"  at most        {plan.most_tokens:,.0f} tokens/s, {plan.most_rps:.3g} requests/s: {BOUNDS[plan.bound]}",
        f"  breaks at      {plan.breaks_at:.3g} requests/s: beyond, 1 of 100 first tokens takes over "
        f"{w.first_token:g} s",
        "",
        "  requests/s  tokens/s  first token p50 / p99, ms  between tokens p50 / p99, ms  copies/s",
    ]
    points = sorted([*plan.curve, plan.at], key=lambda p: p.rps)
    lines += [_row(point, asked=point is plan.at) for point in points]
    if plan.advice:
        lines.append("")
    lines += [f"  {advice.flag or 'more GPUs'}: {advice.why}" for advice in plan.advice]
    return "\n".join(lines) + "\n"


def _row(p: RatePoint, *, asked: bool) -> str:
    first = f"{p.first_token_p50 * 1e3:,.0f} / {p.first_token_p99 * 1e3:,.0f}"
    gap = f"{p.gap_p50 * 1e3:.1f} / {p.gap_p99 * 1e3:.1f}"
    mark = "→" if asked else " "
    return f"{mark} {p.rps:>10.3g}  {p.tokens_per_second:>8,.0f}  {first:>25}  {gap:>28}  {p.copies:>8.3g}"
