"""What the engine says of itself: statistics for the front, and log lines a person can read."""

import logging
from collections import Counter
from time import monotonic

from multilora.adapters.versions.store import AdapterStore
from multilora.engine.messages import AdapterStats, Stats
from multilora.engine.plan import StepPlan
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.memory.page_pool import PageKind

logger = logging.getLogger(__name__)

DECODE_LOG_SECONDS = 2.0


class StatsReporter:
    """Reads scheduler and store; changes nothing."""

    def __init__(self, scheduler: Scheduler, adapters: AdapterStore | None):
        self._scheduler = scheduler
        self._adapters = adapters
        self._since = monotonic()
        self._generated_then = 0

    def step(self, plan: StepPlan) -> None:
        """After a step: a line for every prefill, one for decoding every two seconds."""
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
        generated = self._scheduler.generated_tokens - self._generated_then
        self._since = monotonic()
        self._generated_then = self._scheduler.generated_tokens
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
        if self._adapters is not None:
            text += f", {len(self._adapters.residency)} adapters resident ({pool.count(PageKind.ADAPTER)} pages)"
        return text

    def stats(self) -> Stats:
        scheduler = self._scheduler
        pool = scheduler.kv.pool
        used, total = self._adapters.slots() if self._adapters else (0, 0)
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            total_pages=pool.total,
            free_pages=pool.free,
            kv_pages=pool.count(PageKind.KV),
            prefix_pages=pool.count(PageKind.PREFIX),
            adapter_pages=pool.count(PageKind.ADAPTER),
            page_bytes=scheduler.kv.page_bytes,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            steps=scheduler.launched,
            slots_total=total,
            slots_used=used,
            adapters=self._adapter_stats(),
        )

    def _adapter_stats(self) -> list[AdapterStats]:
        if self._adapters is None:
            return []
        running = Counter(v for request in self._scheduler.running for v in request.versions)
        waiting = Counter(v for request in self._scheduler.waiting for v in request.versions)
        found = []
        for record in self._adapters.records():
            device = self._adapters.device_bytes_of(record.version)
            host = self._adapters.host_bytes_of(record.version)
            found.append(
                AdapterStats(
                    version=record.version,
                    level="device" if device else "host" if host else "disk",
                    pinned=record.pinned,
                    rank=record.rank,
                    running=running[record.version],
                    waiting=waiting[record.version],
                    host_bytes=host,
                    device_bytes=device,
                    loads=record.loads,
                    evictions=record.evictions,
                    fetches=record.fetches,
                    hits=record.hits,
                    misses=record.misses,
                    load_seconds=record.load_seconds,
                )
            )
        return found
