"""`multilora plan` and `LLM.plan`: what a GPU would serve of a workload, where that breaks, and which flag moves it.

Memory is the engine's own plan (`capacity.py`), time a simulation with the calibrated step model. Called by
`llm/offline.py` and `cli/plan/command.py`.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from multilora.errors import ConfigError
from multilora.planner.advice import Advice, advise
from multilora.planner.capacity import Capacity, capacity
from multilora.planner.facts import ModelFacts, model_facts
from multilora.planner.gpus import GpuModel, gpu_model
from multilora.planner.simulation import (
    Adapters,
    Arrival,
    RequestDoesNotFitError,
    Simulated,
    SimulatedLimits,
    Simulation,
    poisson,
    quantile_of,
)
from multilora.planner.step_model import StepModel

MEASURED_RANKS = (1, 2)
"""So many H200s that share a model were measured."""
REQUESTS = 1000
"""How many requests are simulated at each rate."""
SHARES = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""The rates of the curve, as parts of the largest one."""
HALVINGS = 6
USUAL_SHARE = 0.7
"""What is looked at if no rate is given, as a part of the largest one."""


@dataclass(frozen=True)
class Workload:
    """What is asked. tp_size: GPUs that share the model; rank: of every adapter; skew: adapter i is asked for as
    1 / (i + 1) ** skew; rps: requests a second, None for 70 % of the largest rate; first_token: seconds that the 99th
    percentile may take; the rest as the server's flags."""

    model_path: str
    gpu: str = "h200"
    tp_size: int = 1
    adapters: int = 64
    rank: int = 16
    target_modules: tuple[str, ...] | None = None
    rps: float | None = None
    prompt: int = 512
    answer: int = 128
    skew: float = 0.0
    first_token: float = 1.0
    host_bytes: int | None = None
    max_running_requests: int = 64
    chunked_prefill_size: int = 2048
    mem_fraction_static: float = 0.9
    page_size: int = 16
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    quantization: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "tp_size",
            "rank",
            "prompt",
            "answer",
            "max_running_requests",
            "chunked_prefill_size",
            "page_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, is {getattr(self, name)}")
        if self.adapters < 0:
            raise ConfigError(f"--adapters must be 0 or more, is {self.adapters}")
        for name in ("first_token", "rps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be over 0, is {value}")
        if not 0 <= self.skew < math.inf:
            raise ConfigError(f"--skew must be 0 or more, is {self.skew}")
        if not 0 < self.mem_fraction_static <= 1:
            raise ConfigError(f"--mem-fraction-static must be over 0 and at most 1, is {self.mem_fraction_static}")


@dataclass(frozen=True)
class RatePoint:
    """What happens at one rate. Times in seconds; gap: between a request's tokens; copies: of adapters, a second."""

    rps: float
    tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    gap_p50: float
    gap_p99: float
    copies: float
    widest: int


@dataclass(frozen=True)
class ServingPlan:
    """The answer; bytes of weights, arena and adapter are those of one GPU. at: the rate that was asked about;
    most_rps, most_tokens: with requests always waiting; breaks_at: the largest rate at which 99 of 100 first tokens
    come in time; bound: what the largest rate is limited by."""

    workload: Workload
    measured: bool  # whether the GPU is one that was measured, and so many of it
    weights_bytes: int
    arena_bytes: int
    adapter_bytes: int
    device_adapters: int
    host_adapters: int | None
    host_bytes_needed: int
    kv_tokens: int
    copy_seconds: float
    most_rps: float
    most_tokens: float
    bound: str
    breaks_at: float
    at: RatePoint
    curve: list[RatePoint]
    advice: list[Advice]


def plan(workload: Workload) -> ServingPlan:
    """Simulate it. Raises ConfigError, ModelUnsupported, and OutOfMemory where model or request do not fit the
    GPU."""
    return Planner(workload).plan()


class Planner:
    """One workload on one GPU; other limits of the same are tried by `with_limits`."""

    def __init__(self, workload: Workload, facts: ModelFacts | None = None):
        self.workload = workload
        self.gpu: GpuModel = gpu_model(workload.gpu)
        self.facts = facts or model_facts(
            workload.model_path,
            page_size=workload.page_size,
            dtype=workload.dtype,
            kv_cache_dtype=workload.kv_cache_dtype,
            quantization=workload.quantization,
            targets=workload.target_modules,
            tp_size=workload.tp_size,
        )
        context = self.facts.model.config.context_length
        if workload.prompt + workload.answer > context:
            raise ConfigError(
                f"--prompt {workload.prompt} and --answer {workload.answer} exceed the model's context of {context}"
            )

    def with_limits(self, **limits: Any) -> "Planner":
        """The same workload with other limits. Raises OutOfMemory when asked for its capacity, if that is too
        much."""
        return Planner(replace(self.workload, **limits), self.facts)

    def with_model(self, **changes: Any) -> "Planner":
        """The same workload on the model as other flags would hold it."""
        return Planner(replace(self.workload, **changes))

    @cached_property
    def capacity(self) -> Capacity:
        w = self.workload
        return capacity(
            self.facts,
            self.gpu,
            rank=w.rank,
            request_tokens=w.prompt + w.answer,
            running=w.max_running_requests,
            chunk_tokens=w.chunked_prefill_size,
            mem_fraction=w.mem_fraction_static,
            host_bytes=w.host_bytes,
        )

    @property
    def copy_seconds(self) -> float:
        """One adapter from host memory to the device."""
        return self.capacity.adapter_bytes / self.gpu.link

    @cached_property
    def saturated(self) -> Simulated:
        """With requests always waiting."""
        w = self.workload
        count = max(512, 4 * w.max_running_requests)
        queue = poisson(1.0, count, w.prompt, w.answer, w.adapters, skew=w.skew)
        return self._simulate([replace(arrival, at=0.0) for arrival in queue])

    @property
    def most_rps(self) -> float:
        return self.saturated.tokens_per_second / self.workload.answer

    def at(self, rps: float) -> RatePoint:
        """Requests that arrive at random, `rps` a second."""
        w = self.workload
        found = self._simulate(poisson(rps, REQUESTS, w.prompt, w.answer, w.adapters, skew=w.skew))
        return RatePoint(
            rps,
            found.tokens_per_second,
            found.first_token(0.5),
            found.first_token(0.99),
            quantile_of(found.step_seconds, 0.5),
            quantile_of(found.step_seconds, 0.99),
            found.loads / found.seconds,
            found.widest,
        )

    def plan(self) -> ServingPlan:
        w, memory = self.workload, self.capacity
        usual = w.rps or USUAL_SHARE * self.most_rps
        return ServingPlan(
            workload=w,
            measured=self.gpu.measured and w.tp_size in MEASURED_RANKS,
            weights_bytes=self.facts.weight_bytes,
            arena_bytes=memory.memory.arena_bytes,
            adapter_bytes=memory.adapter_bytes,
            device_adapters=memory.device_adapters,
            host_adapters=memory.host_adapters,
            host_bytes_needed=w.adapters * memory.adapter_bytes * w.tp_size,
            kv_tokens=memory.memory.kv_tokens,
            copy_seconds=self.copy_seconds,
            most_rps=self.most_rps,
            most_tokens=self.saturated.tokens_per_second,
            bound=self.bound,
            breaks_at=self._breaks_at(),
            at=self.at(usual),
            curve=[self.at(share * self.most_rps) for share in SHARES],
            advice=advise(self, usual),
        )

    def _breaks_at(self) -> float:
        """By halving; 0 if even a tenth of a request a second is too much."""
        low, high = 0.0, self.most_rps
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            late = self.at(middle).first_token_p99 > self.workload.first_token
            low, high = (low, middle) if late else (middle, high)
        return low

    @property
    def bound(self) -> str:
        if self.saturated.widest >= self.workload.max_running_requests:
            return "slots"
        memory = self.capacity
        kv_pages = self.workload.max_running_requests * memory.request_pages
        return "memory" if kv_pages + memory.adapter_pages > memory.memory.num_pages else "adapters"

    def _simulate(self, arrivals: list[Arrival]) -> Simulated:
        facts, memory = self.facts, self.capacity
        adapters = Adapters(
            (self.workload.rank,), facts.adapter_bytes, lambda _: memory.adapter_pages, lambda _: self.copy_seconds
        )
        limits = SimulatedLimits(
            self.workload.max_running_requests,
            self.workload.chunked_prefill_size,
            memory.memory.num_pages,
            partial(self.facts.layout.most_pages, on_their_way=2 * self.workload.chunked_prefill_size),
        )
        try:
            return Simulation(StepModel(facts, self.gpu).seconds, adapters, limits).run(arrivals)
        except RequestDoesNotFitError:
            raise ConfigError(
                f"a request of {self.workload.prompt + self.workload.answer} tokens with its adapter does not fit "
                f"the arena of {memory.memory.num_pages} pages: a larger GPU, a smaller model, --kv-cache-dtype fp8"
            ) from None
