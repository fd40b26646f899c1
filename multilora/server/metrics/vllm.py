"""The metrics of vLLM 0.33.0 that its Grafana boards and the Gateway API inference extension read, by its names,
types and labels: `model_name` is the base model's, `engine` always 0. `lora_requests_info` and `lora_adapter_loaded`
name adapters and are in `adapters.py`.
"""

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from multilora.config import Config
from multilora.engine.messages import Stats
from multilora.server.metrics import buckets
from multilora.server.metrics.family import Labelled
from multilora.server.metrics.histogram import Histogram
from multilora.server.metrics.totals import Totals

STEP_TOKENS = tuple(2**i for i in (0, *range(3, 15)))  # 1, 8, 16, … 16384


def vllm_metrics(config: Config, totals: Totals, stats: Stats) -> Iterator[Metric]:
    """The state of the engine, then what the front has counted."""
    names = Labelled("vllm:", {"model_name": config.model_name, "engine": "0"})
    yield from _engine(names, stats)
    yield _cache_config(config, stats)
    yield from _counters(names, totals, stats)
    yield from _histograms(names, totals, stats)


def _engine(names: Labelled, stats: Stats) -> Iterator[Metric]:
    deferred = min(stats.waiting, sum(a.waiting for a in stats.adapters if a.level != "device"))
    yield names.gauge("num_requests_running", "Requests in the running batch", stats.running)
    yield names.gauge("num_requests_waiting", "Requests waiting to run", stats.waiting)
    yield names.gauges(
        "num_requests_waiting_by_reason",
        "Requests waiting for room (capacity) or for their adapter (deferred)",
        "reason",
        {"capacity": stats.waiting - deferred, "deferred": deferred},
    )
    level = stats.pause.level  # 0, too, of a sleep that leaves the weights where they are: then no state is 1
    states = {"awake": not stats.pause.sleeping, "weights_offloaded": level == 1, "discard_all": level == 2}
    yield names.gauges("engine_sleep_state", "1 for the state that the engine is in", "sleep_state", states)
    text = "Part of the arena's pages that running requests and adapters hold, 0 to 1"
    yield names.gauge("kv_cache_usage_perc", text, stats.usage)


def _cache_config(config: Config, stats: Stats) -> Metric:
    """Constant facts as labels. The extension reads `block_size` and `num_gpu_blocks`."""
    facts = {
        "block_size": str(config.page_size),
        "num_gpu_blocks": str(stats.total_pages),
        "enable_prefix_caching": str(not config.disable_radix_cache),
        "gpu_memory_utilization": str(config.mem_fraction_static),
        "cache_dtype": "auto",
        "engine": "0",
    }
    return Labelled("vllm:", {}).gauge("cache_config_info", "Facts about the KV cache, as labels", 1, **facts)


def _counters(names: Labelled, totals: Totals, stats: Stats) -> Iterator[Metric]:
    looked_up = stats.prompt_tokens + stats.cached_tokens
    yield names.counter("prompt_tokens", "Prompt tokens of requests that began to answer", totals.prompt_tokens)
    yield names.counter("generation_tokens", "Tokens generated", totals.generated_tokens)
    yield names.counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache", totals.cached_tokens)
    computed = totals.prompt_tokens - totals.cached_tokens
    sources = {"local_compute": computed, "local_cache_hit": totals.cached_tokens, "external_kv_transfer": 0}
    yield names.counters("prompt_tokens_by_source", "Where prompt tokens came from", "source", sources)
    yield names.counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", looked_up)
    yield names.counter("prefix_cache_hits", "Prompt tokens found there", stats.cached_tokens)
    yield names.counter("num_preemptions", "Requests sent back to the queue to free memory", stats.preemptions)
    for name, text, value in totals.drafts.families():
        yield names.counter(name, text, value)
    yield names.counters("request_success", "Requests ended, by reason", "finished_reason", totals.endings)


def _histograms(names: Labelled, totals: Totals, stats: Stats) -> Iterator[Metric]:
    latency, tokens = buckets.VLLM_LATENCY, totals.token_bounds
    for name, text, source, bounds in (
        (
            "time_to_first_token_seconds",
            "From arrival to the first token",
            totals.first_token,
            buckets.VLLM_FIRST_TOKEN,
        ),
        ("inter_token_latency_seconds", "Between two tokens", totals.inter_token, buckets.VLLM_INTER_TOKEN),
        (
            "request_time_per_output_token_seconds",
            "Mean time between the tokens of a request",
            totals.per_output_token,
            buckets.VLLM_INTER_TOKEN,
        ),
        ("e2e_request_latency_seconds", "From arrival to the last token", totals.latency, latency),
        ("request_queue_time_seconds", "From submission to the first step", totals.queue, latency),
        ("request_prefill_time_seconds", "From the first step to the first token", totals.prefill, latency),
        ("request_decode_time_seconds", "From the first token to the last", totals.decode, latency),
        ("request_inference_time_seconds", "From the first step to the last token", totals.inference, latency),
        ("request_prompt_tokens", "Prompt tokens of a request", totals.request_prompt, tokens),
        ("request_generation_tokens", "Tokens generated for a request", totals.request_generated, tokens),
        (
            "request_max_num_generation_tokens",
            "Tokens generated for a sample of a request",
            totals.request_generated,
            tokens,
        ),
        ("request_params_n", "The parameter n", totals.request_n, buckets.VLLM_SAMPLES),
        ("request_params_max_tokens", "The parameter max_tokens", totals.request_max_tokens, tokens),
    ):
        yield names.histogram(name, text, source, bounds)
    yield names.histogram("iteration_tokens_total", "Tokens of one step", _steps(stats), STEP_TOKENS)


def _steps(stats: Stats) -> Histogram:
    """The engine's own counts, by powers of two."""
    steps = Histogram(2**i for i in range(15))
    for exponent, number in enumerate(stats.step_tokens):
        steps.observe(2**exponent, number)
    steps.sum = float(stats.prompt_tokens + stats.generated_tokens)
    return steps
