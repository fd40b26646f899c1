"""A greedy tenant beside nine modest ones on a real engine: first tokens and throughput under `fair` and `fcfs`.

    python -m bench.tenants [--seconds 20] [--out bench/results/tenants.json]

The trace of `tenant_trace.py` over 40 adapters of rank 16, on the random Llama of `bench.cpu`, in this process. The
rates follow the machine: the greedy tenant asks for 1.5 times, each modest one for 3 % of what the engine can serve.
"alone" is the modest tenants' part of the same trace.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import environment, finish, say
from bench.cpu import make_adapters, make_model
from bench.tenant_trace import ADAPTERS, Arrival, modest_only, p99, trace
from multilora.adapters.loading.loader import InlineLoader
from multilora.config import Config
from multilora.engine.build import build_engine
from multilora.engine.engine import Engine
from multilora.engine.messages import LoadAdapter, Outputs, Submit
from multilora.params import SamplingParams

PROMPT, ANSWER, SLOTS = 48, 24, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals")
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="multilora-bench-"))
    try:
        finish(run(directory, args.seconds), args.out)
    finally:
        shutil.rmtree(directory)


def run(directory: Path, seconds: float) -> dict[str, Any]:
    make_adapters(make_model(directory / "model"), directory, ADAPTERS)
    burst = [Arrival(0.0, "greedy", i % ADAPTERS, PROMPT, ANSWER) for i in range(4 * SLOTS)]
    _, spent = replay(make_engine(directory, "fcfs"), burst)
    rate = len(burst) / spent
    arrivals = trace(seconds, 1.5 * rate, 0.03 * rate, prompt=PROMPT, answer=ANSWER)
    result: dict[str, Any] = environment()
    result["workload"] = f"{len(arrivals)} requests in {seconds:g} s, {len(modest_only(arrivals))} of them modest"
    tokens = sum(one.answer for one in arrivals)
    for name, policy, part in (
        ("alone", "fair", modest_only(arrivals)),
        ("fair", "fair", arrivals),
        ("fcfs", "fcfs", arrivals),
    ):
        first, spent = replay(make_engine(directory, policy), part)
        result[name] = {"modest_first_token_p99_ms": p99(first) * 1e3}
        if part is arrivals:
            result[name]["tokens_per_second"] = tokens / spent
        say(f"{name:>6} {result[name]}")
    result["p99_over_alone"] = (
        result["fair"]["modest_first_token_p99_ms"] / result["alone"]["modest_first_token_p99_ms"]
    )
    result["throughput_over_fcfs"] = result["fair"]["tokens_per_second"] / result["fcfs"]["tokens_per_second"]
    return result


def make_engine(directory: Path, policy: str) -> Engine:
    """All adapters are loaded, and the engine has run each of them."""
    config = Config.make(
        model_path=str(directory / "model"), enable_lora=True, schedule_policy=policy, max_running_requests=SLOTS
    )
    engine = build_engine(config, InlineLoader)
    for i in range(ADAPTERS):
        engine.handle(LoadAdapter(call=i + 1, version=i + 1, path=str(directory / f"a{i}")))
    while engine.busy:
        engine.step()
    replay(engine, [Arrival(0.0, "warm-up", i, 4, 2) for i in range(ADAPTERS)])
    return engine


def replay(engine: Engine, arrivals: Sequence[Arrival]) -> tuple[list[float], float]:
    """Seconds to first tokens of the modest tenants' requests, and until all requests have ended."""
    start, came = time.perf_counter(), 0
    first: dict[str, float] = {}
    while came < len(arrivals) or engine.busy:
        now = time.perf_counter() - start
        while came < len(arrivals) and arrivals[came].seconds <= now:
            engine.handle(_submit(came, arrivals[came]))
            came += 1
        for message in engine.step():
            if isinstance(message, Outputs):
                for output in message.items:
                    assert output.finished is None or output.finished.type == "length", output.finished
                    first.setdefault(output.rid, time.perf_counter() - start)
        if not engine.busy and came < len(arrivals):
            time.sleep(max(0.0, arrivals[came].seconds - (time.perf_counter() - start)))
    waits = [first[str(i)] - one.seconds for i, one in enumerate(arrivals) if not one.greedy]
    return waits, time.perf_counter() - start


def _submit(number: int, one: Arrival) -> Submit:
    return Submit(
        rid=str(number),
        input_ids=[3 + (number * 31 + i * 7) % 16_000 for i in range(one.prompt)],
        sampling=SamplingParams(temperature=0, max_new_tokens=one.answer, ignore_eos=True),
        adapters=((one.adapter + 1, 1.0),),
        tenant=one.tenant,
    )


if __name__ == "__main__":
    main()
