"""The engine's numbers under this server's own names, where no peer has one for them."""

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from multilora.engine.messages import Stats
from multilora.server.metrics.family import Labelled

_OWN = Labelled("multilora:", {})


def own_metrics(stats: Stats, restarts: int) -> Iterator[Metric]:
    """Pages of the arena, whether the engine is at rest, and what it has computed since it started. restarts: how
    often another engine was started in place of one that had ended."""
    yield _OWN.counter("engine_restarts", "Engines started in place of one that had ended", restarts)
    yield _OWN.gauge("paused", "1 while generation is paused, asleep or not", stats.pause.mode is not None)
    yield _OWN.gauge("sleeping", "1 while the engine is asleep", stats.pause.sleeping)
    yield _OWN.gauge("page_bytes", "Bytes of one page of the arena", stats.page_bytes)
    uses = ("free", "kv", "prefix", "adapter")
    pages = {use: getattr(stats, f"{use}_pages") for use in uses}
    yield _OWN.gauges("pages", "Pages of the arena by use", "use", pages)
    yield _OWN.counter("engine_prompt_tokens", "Prompt tokens computed", stats.prompt_tokens)
    yield _OWN.counter("engine_cached_tokens", "Prompt tokens taken from the prefix cache", stats.cached_tokens)
    yield _OWN.counter("engine_generated_tokens", "Tokens sampled", stats.generated_tokens)
    yield _OWN.counter("preemptions", "Requests sent back to the queue to free memory", stats.preemptions)
    yield _OWN.counter("steps", "Steps of the engine", stats.steps)
