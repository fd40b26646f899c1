"""The metrics of SGLang 0.5.23 that its Grafana board, its benchmarks and the Gateway API inference extension read,
by its names, types and labels. `cache_config_info` is of older versions; the extension reads it.

There is no label `is_streaming`: nothing that reads these metrics selects by it.
"""

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from multilora.config import Config
from multilora.engine.messages import Stats
from multilora.server.metrics import buckets
from multilora.server.metrics.family import Labelled
from multilora.server.metrics.totals import Totals


def sglang_metrics(config: Config, totals: Totals, stats: Stats, context_length: int) -> Iterator[Metric]:
    """The state of the scheduler, then what the front has counted."""
    labels = {"model_name": config.model_name, "engine_type": "unified"}
    scheduler = Labelled("sglang:", labels | {"tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"})
    yield from _scheduler(scheduler, config, stats, context_length)
    yield scheduler.gauge(
        "cache_config_info",
        "Facts about the KV cache, as labels",
        1,
        page_size=str(config.page_size),
        num_pages=str(stats.total_pages),
    )
    yield from _requests(Labelled("sglang:", labels), totals)


def _scheduler(names: Labelled, config: Config, stats: Stats, context_length: int) -> Iterator[Metric]:
    utilization = stats.slots_used / stats.slots_total if stats.slots_total else 0.0
    for name, text, value in (
        ("num_running_reqs", "Requests in the running batch", stats.running),
        ("num_queue_reqs", "Requests waiting to run", stats.waiting),
        (
            "num_used_tokens",
            "Tokens that the running requests' pages hold room for",
            stats.kv_pages * config.page_size // stats.block_pages,
        ),
        ("token_usage", "Part of the arena's pages that running requests and adapters hold, 0 to 1", stats.usage),
        ("gen_throughput", "Tokens generated in a second", stats.gen_throughput if stats.running else 0.0),
        ("cache_hit_rate", "Part of the latest prompts' tokens found in the prefix cache", stats.cache_hit_rate),
        (
            "max_total_num_tokens",
            "Tokens of KV cache that the arena holds",
            stats.total_pages * config.page_size // stats.block_pages,
        ),
        ("page_size", "Tokens in one page", config.page_size),
        ("num_pages", "Pages of the arena", stats.total_pages),
        ("context_len", "Longest prompt plus answer, in tokens", context_length),
        ("lora_pool_slots_used", "Adapters resident on the device", stats.slots_used),
        ("lora_pool_slots_total", "Adapters that can be resident at once", stats.slots_total),
        ("lora_pool_utilization", "slots_used / slots_total", utilization),
    ):
        yield names.gauge(name, text, value)
    text = "Requests sent back to the queue to free memory"
    yield names.counter("num_retracted_requests", text, stats.preemptions)


def _requests(names: Labelled, totals: Totals) -> Iterator[Metric]:
    yield names.counter("prompt_tokens", "Prompt tokens of requests that began to answer", totals.prompt_tokens)
    yield names.counter("generation_tokens", "Tokens generated", totals.generated_tokens)
    text = "Prompt tokens found in the prefix cache"
    yield names.counter("cached_tokens", text, totals.cached_tokens, cache_source="device")
    yield names.counter("num_requests", "Requests ended", totals.endings.total())
    yield names.counter("num_aborted_requests", "Requests aborted", totals.endings["abort"])
    for name, text, source, bounds in (
        (
            "time_to_first_token_seconds",
            "From arrival to the first token",
            totals.first_token,
            buckets.SGLANG_FIRST_TOKEN,
        ),
        ("inter_token_latency_seconds", "Between two tokens", totals.inter_token, buckets.SGLANG_INTER_TOKEN),
        (
            "request_time_per_output_token_seconds",
            "Mean time between the tokens of a request",
            totals.per_output_token,
            buckets.SGLANG_INTER_TOKEN,
        ),
        ("e2e_request_latency_seconds", "From arrival to the last token", totals.latency, buckets.SGLANG_LATENCY),
    ):
        yield names.histogram(name, text, source, bounds)
