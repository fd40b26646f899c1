"""What the engine says of itself: statistics for the front, and log lines a person can read."""

import logging
from collections.abc import Callable, Iterable
from time import monotonic

from multilora.adapters.lifecycle.disabled import AnyStore
from multilora.adapters.lifecycle.version import AdapterVersion
from multilora.engine.messages import AdapterStats, PauseState, Stats
from multilora.engine.plan import StepPlan
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.memory.page_pool import PageKind

logger = logging.getLogger(__name__)

DECODE_LOG_SECONDS = 2.0
STEP_SIZES = 16  # step sizes are counted by powers of two: up to 1, 2, … 2**14 tokens, and more


class StatsReporter:
    """Reads scheduler and store. Changes only what `stats_update` has told already."""

    def __init__(
        self, scheduler: Scheduler, adapters: AnyStore, pause: Callable[[], PauseState] = lambda: PauseState()
    ):
        self._scheduler = scheduler
        self._adapters = adapters
        self._pause = pause
        self._since = monotonic()
        self._generated_then = 0
        self._step_tokens = [0] * STEP_SIZES
        self._tokens_then = 0  # prompt and generated, at the step before
        self._rates = _Rates(scheduler)

    def step(self, plan: StepPlan) -> None:
        """Count a step that has run, and log it: a line for every prefill, one for decoding every two seconds."""
        tokens = self._scheduler.counts.prompt + self._scheduler.counts.generated
        size = max(0, tokens - self._tokens_then - 1).bit_length()
        self._step_tokens[min(size, STEP_SIZES - 1)] += 1
        self._tokens_then = tokens
        if logger.isEnabledFor(logging.INFO):
            prefill = [c for c in plan.chunks if not c.decodes]
            if prefill:
                self._log_prefill(len(prefill), sum(c.count for c in prefill))
            decodes = len(plan.chunks) - len(prefill)
            if decodes and (elapsed := monotonic() - self._since) >= DECODE_LOG_SECONDS:
                self._log_decode(decodes, elapsed)

    def _log_prefill(self, requests: int, tokens: int) -> None:
        logger.info(
            "prefill: %d requests, %d new tokens; %d running, %d queued, %s",
            requests,
            tokens,
            len(self._scheduler.running),
            len(self._scheduler.waiting),
            self._memory(),
        )

    def _log_decode(self, requests: int, elapsed: float) -> None:
        generated = self._scheduler.counts.generated - self._generated_then
        self._since = monotonic()
        self._generated_then = self._scheduler.counts.generated
        logger.info(
            "decode: %d requests, %.1f tokens/s; %d queued, %s",
            requests,
            generated / elapsed,
            len(self._scheduler.waiting),
            self._memory(),
        )

    def _memory(self) -> str:
        pool = self._scheduler.kv.pool
        usage = pool.count(PageKind.KV) / pool.total
        text = f"token usage {usage:.2f} ({pool.count(PageKind.PREFIX)} pages of prefix cache)"
        used, total = self._adapters.slots()
        if total:
            text += f", {used} adapters resident ({pool.count(PageKind.ADAPTER)} pages)"
        return text

    def stats(self) -> Stats:
        """The whole picture. O(adapters): not for the step loop."""
        return self._stats(self._adapters.loaded(), [])

    def stats_update(self) -> Stats:
        """What is new since the last update: of adapters, only those that have changed."""
        self._rates.measure()
        return self._stats(*self._adapters.take_changes())

    def _stats(self, adapters: Iterable[AdapterVersion], unloaded: list[int]) -> Stats:
        scheduler = self._scheduler
        pool, page_bytes = scheduler.kv.pool, scheduler.kv.page_bytes
        used, total = self._adapters.slots()
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            total_pages=pool.total,
            free_pages=pool.free,
            kv_pages=pool.count(PageKind.KV),
            prefix_pages=pool.count(PageKind.PREFIX),
            adapter_pages=pool.count(PageKind.ADAPTER),
            page_bytes=page_bytes,
            block_pages=scheduler.kv.columns,
            prompt_tokens=scheduler.counts.prompt,
            cached_tokens=scheduler.counts.cached,
            generated_tokens=scheduler.counts.generated,
            preemptions=scheduler.preemptions,
            steps=scheduler.launched,
            slots_total=total,
            slots_used=used,
            adapters=[_adapter_stats(adapter, page_bytes) for adapter in adapters],
            unloaded=unloaded,
            pause=self._pause(),
            gen_throughput=self._rates.gen_throughput,
            cache_hit_rate=self._rates.cache_hit_rate,
            step_tokens=list(self._step_tokens),
        )


class _Rates:
    """Rates between two updates. A rate stays what it was where nothing has happened since."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._then = (monotonic(), 0, 0, 0)
        self.gen_throughput = self.cache_hit_rate = 0.0

    def measure(self) -> None:
        """An update is about to be sent."""
        scheduler = self._scheduler
        now = (monotonic(), scheduler.counts.generated, scheduler.counts.prompt, scheduler.counts.cached)
        seconds, generated, computed, cached = (a - b for a, b in zip(now, self._then, strict=True))
        self._then = now
        if generated and seconds:
            self.gen_throughput = generated / seconds
        if computed + cached:
            self.cache_hit_rate = cached / (computed + cached)


def _adapter_stats(adapter: AdapterVersion, page_bytes: int) -> AdapterStats:
    return AdapterStats(
        version=adapter.version,
        level="device" if adapter.device else "host" if adapter.host else "disk",
        pinned=adapter.pinned,
        rank=adapter.rank,
        running=adapter.refs,
        waiting=adapter.waiting,
        host_bytes=adapter.host.nbytes if adapter.host else 0,
        device_bytes=len(adapter.device.pages) * page_bytes if adapter.device else 0,
        loads=adapter.loads,
        evictions=adapter.evictions,
        fetches=adapter.fetches,
        hits=adapter.hits,
        misses=adapter.misses,
        load_seconds=adapter.load_seconds,
    )
