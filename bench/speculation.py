"""Speculative decoding: tokens a second with drafts and without, on text that repeats itself and on text that does
not.

    python -m bench.speculation [--batches 1 8] [--new 256] [--rounds 5] [--out bench/results/speculation.json]
    python -m bench.speculation --device cuda --dims llama-8b

On CPU the bundled model in fp32 and its adapters, one thread; the clock is the process's CPU time, so that others on
the machine count less. On CUDA random weights of these dimensions, without adapters, and wall time.

repetitive: greedy, after a prompt that says the same four times. sampled: temperature 1, after a short prompt.
random: temperature 3, hardly anything comes twice. Every row is measured with drafts and without, in turns, in
engines that are there from the start to the end: the best of the rounds counts. On CPU the tokens must be the same.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.common import Row, environment, finish
from bench.gpu.sizes import SIZES, write_model
from multilora import demo
from multilora.adapters.loading.loader import InlineLoader
from multilora.config import Config
from multilora.engine.build import build_engine
from multilora.engine.engine import Engine
from multilora.engine.messages import LoadAdapter, Output, Outputs, Reply, Submit
from multilora.front.tokenizer import Tokenizer
from multilora.params import SamplingParams

STATEMENT = (
    "Q: Name the months of the year.\nA: January, February, March, April, May, June, July, August, September, "
    "October, November, December.\n"
)
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "repetitive": (4 * STATEMENT + "Q: Name the months of the year.\nA:", {"temperature": 0.0}),
    "sampled": ("Q: Tell me about Brazil.\nA:", {"temperature": 1.0}),
    "random": ("Q: Tell me about Brazil.\nA:", {"temperature": 3.0}),
}
TARGETS = {("repetitive", 1): 1.6}
NEVER_SLOWER = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dims", choices=SIZES, help="random weights of such a model instead of the bundled one")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    directory = Path(tempfile.mkdtemp(prefix="multilora-bench-"))
    try:
        finish(run(directory, args), args.out)
    finally:
        shutil.rmtree(directory)


def run(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    result = environment("transformers")
    result["clock"] = "CPU time" if args.device == "cpu" else "wall time"
    options: dict[str, Any] = {"device": args.device, "disable_radix_cache": True, "random_seed": 0}
    options |= {"max_total_tokens": 4096 * max(args.batches), "max_running_requests": max(args.batches)}
    if args.dims:
        model = write_model(directory / "model", SIZES[args.dims][0])
        options |= {"model_path": model, "load_format": "dummy"}
    names = () if args.dims else tuple(demo.adapter_paths())
    plain, drafting = (Side.start(names, options | more) for more in ({}, {"speculative_algorithm": "ngram"}))
    result["rows"] = []
    for batch in args.batches:
        for text in TEXTS:
            for adapters in ((), names) if names else ((),):
                result["rows"].append(measure(plain, drafting, text, batch, adapters, args))
                if args.out:  # what is measured by now
                    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    plain.engine.close()
    drafting.engine.close()
    return result


@dataclass
class Done:
    """What came of one batch."""

    seconds: float
    tokens: dict[str, list[int]] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0

    @property
    def speed(self) -> float:
        return sum(map(len, self.tokens.values())) / self.seconds


class Side:
    """An engine with its adapters resident."""

    def __init__(self, engine: Engine, config: Config):
        self.engine = engine
        self._clock = time.process_time if config.device == "cpu" else time.perf_counter
        self._tokenizer = None if config.load_format == "dummy" else Tokenizer.of(config)
        self._versions: dict[str, int] = {}

    @classmethod
    def start(cls, adapters: tuple[str, ...], options: dict[str, Any]) -> "Side":
        config = Config.make(enable_lora=bool(adapters), **options)
        side = cls(build_engine(config, InlineLoader), config)
        for version, name in enumerate(adapters, 1):
            path = str(demo.adapter_paths()[name])
            side.engine.handle(LoadAdapter(call=version, version=version, path=path))
            side._versions[name] = version
        side._run(Done(0.0))
        return side

    def answer(self, text: str, batch: int, adapters: tuple[str, ...], new: int) -> Done:
        """So many requests at once, on base and then each of the adapters in turn."""
        prompt, sampling = TEXTS[text]
        for i in range(batch):
            params = SamplingParams(max_new_tokens=new, ignore_eos=True, sampling_seed=i, **sampling)
            on = (None, *adapters)[(i + bool(adapters)) % (1 + len(adapters))]
            parts = () if on is None else ((self._versions[on], 1.0),)
            self.engine.handle(Submit(rid=str(i), input_ids=self._ids(prompt), sampling=params, adapters=parts))
        done, start = Done(0.0), self._clock()
        self._run(done)
        done.seconds = self._clock() - start
        return done

    def _ids(self, text: str) -> list[int]:
        return [b % 96 for b in text.encode()] if self._tokenizer is None else self._tokenizer.encode(text)

    def _run(self, done: Done) -> None:
        while self.engine.busy:
            for message in self.engine.step():
                match message:
                    case Outputs(items):
                        for output in items:
                            _add(done, output)
                    case Reply(ok=False, message=text):
                        raise RuntimeError(text)


def _add(done: Done, output: Output) -> None:
    assert output.finished is None or output.finished.type == "length", output.finished
    done.tokens.setdefault(output.rid, []).extend(output.token_ids)
    done.drafted += output.drafted
    done.accepted += output.accepted


def measure(
    plain: Side, drafting: Side, text: str, batch: int, adapters: tuple[str, ...], args: argparse.Namespace
) -> dict[str, Any]:
    """The first round is the warm-up of both, and of what is learnt of drafts."""
    best: list[Done | None] = [None, None]
    for turn in range(1 + args.rounds):
        found = [side.answer(text, batch, adapters, args.new) for side in (plain, drafting)]
        assert found[0].tokens == found[1].tokens or args.device == "cuda", "drafts have changed an answer"
        if turn:
            best = [one if b is None or one.speed > b.speed else b for one, b in zip(found, best, strict=True)]
    off, on = best
    assert off is not None
    assert on is not None
    equal = sum(on.tokens[rid] == off.tokens[rid] for rid in on.tokens) / len(on.tokens)
    name = f"{text}, {batch} at a time, " + ("an adapter each" if adapters else "base")
    target = TARGETS.get((text, batch), NEVER_SLOWER)
    more = {"off": off.speed, "on": on.speed, "drafted": float(on.drafted), "equal": equal}
    more["acceptance"] = on.accepted / on.drafted if on.drafted else 0.0
    return Row(name, "x", target).show(on.speed / off.speed, **more)


if __name__ == "__main__":
    main()
