"""Runs `multilora adapters merge`, `compose`, `convert`, `diff` and `bench`: arguments in, text or JSON and an exit
code out. Called by `__main__.py`."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from multilora.adapter_tools import render_work
from multilora.adapter_tools.bench import bench
from multilora.adapter_tools.compose import compose
from multilora.adapter_tools.convert.convert import convert
from multilora.adapter_tools.diff import diff
from multilora.adapter_tools.merge import merge
from multilora.cli.adapter_work import AdapterWorkArgs
from multilora.errors import AdapterError


def run(args: AdapterWorkArgs) -> int:
    """Run one command and return its exit code. 0: done, or for diff the same; 1: an adapter is refused, or they
    differ. Raises ConfigError, ModelUnsupported, OutOfMemory."""
    try:
        result, text = _run(args, progress=sys.stderr.isatty())
    except AdapterError as e:
        error = {"ok": False, "error": {"kind": e.kind, "message": e.message}}
        _write(json.dumps(error, indent=2) if args.json else f"{args.command}: refused: {e.kind}: {e.message}")
        return 1
    _write(json.dumps(_finite(dataclasses.asdict(result)), indent=2) if args.json else text)
    return int(args.command == "diff" and not result.same)


def _run(args: AdapterWorkArgs, *, progress: bool) -> tuple[Any, str]:
    out = Path(args.out or "").expanduser()
    if args.command == "merge":
        merged = merge(args.paths[0], str(args.model_path), out, progress=progress)
        return merged, render_work.merged(merged)
    if args.command == "compose":
        composed = compose(
            list(zip(args.paths, args.weights, strict=True)),
            out,
            method=args.method,
            rank=args.rank,
            density=args.density,
            sign=args.sign,
            seed=args.seed,
            progress=progress,
        )
        return composed, render_work.composed(composed)
    if args.command == "convert":
        converted = convert(args.paths[0], out, model_path=args.model_path, alpha=args.alpha, progress=progress)
        return converted, render_work.converted(converted)
    if args.command == "diff":
        found = diff(*args.paths, progress=progress)
        return found, render_work.difference(found)
    cost = bench(
        args.paths[0],
        str(args.model_path),
        batches=args.batch,
        prompt=args.prompt,
        steps=args.steps,
        progress=progress,
        dtype=args.dtype,
        device=args.device,
    )
    return cost, render_work.cost(cost)


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
