"""What is counted of the requests of one adapter or of one tenant, and how it is shown: requests, tokens, times and
errors.

The names are those of the same thing in vLLM, with this server's prefix: there they have no such labels, and a sum
over both would count twice.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from multilora.front.observer import Ending, FirstOutput
from multilora.front.workers.messages import TokenTimes
from multilora.server.metrics import buckets
from multilora.server.metrics.drafts import FAMILIES, DraftCounts
from multilora.server.metrics.histogram import Histogram
from multilora.server.metrics.top_names import TopNames

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
INTER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


def inter_token_histogram() -> Histogram:
    """An empty one, for ours and the peers' metrics of the time between two tokens."""
    return Histogram(INTER_TOKEN, buckets.VLLM_INTER_TOKEN, buckets.SGLANG_INTER_TOKEN)


class Usage:
    """Counters only grow. engine: what the engine has counted of the adapter, by `AdapterStats`' words."""

    def __init__(self) -> None:
        self.started = self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.drafts = DraftCounts()
        self.endings = Counter[str]()
        self.errors = Counter[str]()
        self.engine = defaultdict[str, float](float)
        self.first_token = Histogram(SECONDS)
        self.inter_token = inter_token_histogram()
        self.queue = Histogram(SECONDS)

    def first_output(self, output: FirstOutput) -> None:
        """Count the prompt and what came of it at once."""
        self.prompt_tokens += output.prompt_tokens
        self.cached_tokens += output.cached_tokens
        self.generated_tokens += output.generated
        self.first_token.observe(output.seconds)
        self.queue.observe(output.queue_seconds)

    def next_output(self, tokens: int, seconds: float) -> None:
        """Each of the tokens counts with its share of the time."""
        self.generated_tokens += tokens
        self.inter_token.observe(seconds / tokens, tokens)

    def next_outputs(self, times: TokenTimes) -> None:
        """Count what another process has, by `inter_token_histogram`."""
        self.generated_tokens += sum(times.counts)
        self.inter_token.add(times.counts, times.sum)

    def ended(self, ending: Ending) -> None:
        """Count a sample that has ended."""
        self.endings[ending.reason] += 1
        if ending.error:
            self.errors[ending.error] += 1

    def absorb(self, other: "Usage") -> None:
        """Add what `other` has counted."""
        self.started += other.started
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.generated_tokens += other.generated_tokens
        self.drafts.absorb(other.drafts)
        self.endings.update(other.endings)
        self.errors.update(other.errors)
        for attribute, number in other.engine.items():
            self.engine[attribute] += number
        self.first_token.absorb(other.first_token)
        self.inter_token.absorb(other.inter_token)
        self.queue.absorb(other.queue)


_COUNTERS: dict[str, tuple[str, Callable[[Usage], int]]] = {
    "requests_started": ("Requests submitted to the engine", lambda u: u.started),
    "prompt_tokens": ("Prompt tokens of requests that began to answer", lambda u: u.prompt_tokens),
    "prompt_tokens_cached": ("Prompt tokens found in the prefix cache", lambda u: u.cached_tokens),
    "generation_tokens": ("Tokens generated", lambda u: u.generated_tokens),
}
_BY_REASON: dict[str, tuple[str, str, Callable[[Usage], Counter[str]]]] = {
    "requests": ("Requests ended", "finish_reason", lambda u: u.endings),
    "request_errors": ("Requests refused or failed, by the error's name", "error", lambda u: u.errors),
}
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...], Callable[[Usage], Histogram]]] = {
    "time_to_first_token_seconds": ("From arrival to the first output", SECONDS, lambda u: u.first_token),
    "inter_token_latency_seconds": ("Between two tokens", INTER_TOKEN, lambda u: u.inter_token),
    "request_queue_time_seconds": ("From submission to the first step", SECONDS, lambda u: u.queue),
}


def usage_metrics(prefix: str, label: str, names: TopNames[Usage]) -> Iterator[Metric]:
    """One family for each thing that is counted; what has no event is left out."""
    used = [(name, usage) for name, usage in names.items() if usage.started]
    for name, (text, count) in _COUNTERS.items():
        counter = CounterMetricFamily(prefix + name, text, labels=[label])
        for value, usage in used:
            counter.add_metric([value], count(usage))
        yield counter
    for i, (name, text) in enumerate(FAMILIES.items()):
        counter = CounterMetricFamily(prefix + name, text, labels=[label])
        for value, usage in used:
            if usage.drafts.drafts:
                counter.add_metric([value], [*usage.drafts.families()][i][2])
        yield counter
    for name, (text, reason, counts) in _BY_REASON.items():
        counter = CounterMetricFamily(prefix + name, text, labels=[label, reason])
        for value, usage in names.items():
            for key, number in counts(usage).items():
                counter.add_metric([value, key], number)
        yield counter
    for name, (text, bounds, histogram) in _HISTOGRAMS.items():
        family = HistogramMetricFamily(prefix + name, text, labels=[label])
        for value, usage in used:
            histogram(usage).add_to(family, [value], bounds)
        yield family
