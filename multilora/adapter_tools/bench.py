"""`multilora adapters bench`: what one adapter costs on this machine: bytes, loading, and time beside the base model.

Prompts are random token ids; base model and adapter take turns, and the best of several runs counts, so that other
work on the machine disturbs little. Called by `cli/adapter_work_commands.py`.
"""

import random
import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from multilora.adapters.sources import resolve
from multilora.errors import ConfigError
from multilora.llm.offline import LLM

NAME = "adapter"


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds with the base model and with the adapter, for all rows of a batch."""

    batch: int
    base_ms: float
    adapter_ms: float

    @property
    def over_percent(self) -> float:
        return (self.adapter_ms / self.base_ms - 1) * 100


@dataclass(frozen=True)
class AdapterCost:
    """The cost of one adapter. decode: of a step; prefill: of the prompts of a batch; first_ms: its first request,
    copy to the device included, over a later one."""

    path: str
    model_path: str
    device: str
    dtype: str
    rank: int
    nbytes: int
    load_seconds: float
    first_ms: float
    prompt: int
    decode: list[StepCosts]
    prefill: list[StepCosts]


def bench(
    path: str,
    model_path: str,
    *,
    batches: tuple[int, ...] = (1, 8),
    prompt: int = 128,
    steps: int = 32,
    repeats: int = 3,
    progress: bool = False,
    **options: Any,
) -> AdapterCost:
    """Measure it. options: fields of `Config`, such as dtype and device. Raises ConfigError and AdapterError."""
    for name, value in (("--batch", min(batches, default=0)), ("--prompt", prompt), ("--steps", steps)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, is {value}")
    directory = str(resolve(path))
    options = {"disable_radix_cache": True, "skip_tokenizer_init": True} | options
    options["max_running_requests"] = max(64, *batches)
    with LLM(model_path, enable_lora=True, **options) as llm:
        began = time.perf_counter()
        info = llm.load_lora_adapter(NAME, directory)
        loaded = time.perf_counter() - began
        timer = _Timer(llm, prompt, steps, repeats)
        first = timer.seconds(1, NAME, 1) - min(timer.seconds(1, NAME, 1) for _ in range(repeats))
        decode, prefill = [], []
        for batch in tqdm(batches, desc="bench", unit="batch", disable=not progress):
            both = timer.measure(batch)
            prefill.append(both[0])
            decode.append(both[1])
        ready = llm.engine.ready()
    return AdapterCost(
        path,
        model_path,
        ready.device,
        ready.dtype,
        info.rank,
        info.nbytes,
        loaded,
        max(0.0, first) * 1e3,
        prompt,
        decode,
        prefill,
    )


class _Timer:
    """Times closed batches through `LLM.generate`."""

    def __init__(self, llm: LLM, prompt: int, steps: int, repeats: int):
        self._llm, self._prompt, self._steps, self._repeats = llm, prompt, steps, repeats
        self._vocab = llm.engine.ready().vocab_size
        self._random = random.Random(0)

    def seconds(self, batch: int, adapter: str | None, tokens: int) -> float:
        ids = [[self._random.randrange(3, self._vocab) for _ in range(self._prompt)] for _ in range(batch)]
        params = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": tokens}
        began = time.perf_counter()
        self._llm.generate(ids, params, [adapter] * batch)
        return time.perf_counter() - began

    def measure(self, batch: int) -> tuple[StepCosts, StepCosts]:
        """(prompts, one decode step) of a batch."""
        short: dict[str | None, list[float]] = {None: [], NAME: []}
        long: dict[str | None, list[float]] = {None: [], NAME: []}
        for _ in range(self._repeats + 1):  # the first one warms up
            for adapter in (None, NAME):
                short[adapter].append(self.seconds(batch, adapter, 1))
                long[adapter].append(self.seconds(batch, adapter, 1 + self._steps))

        def best(times: dict[str | None, list[float]], adapter: str | None) -> float:
            return min(times[adapter][1:]) * 1e3

        def step(adapter: str | None) -> float:
            return max(1e-6, (best(long, adapter) - best(short, adapter)) / self._steps)

        return (
            StepCosts(batch, best(short, None), best(short, NAME)),
            StepCosts(batch, step(None), step(NAME)),
        )
