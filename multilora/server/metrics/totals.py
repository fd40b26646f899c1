"""What the front counts over all adapters: tokens, endings, and times as histograms, for both peers' families.

One `Totals` belongs to one server. The peers' histograms of the same thing differ in their buckets only, so each is
observed once (`histogram.py`). What each token adds is counted by adapter only, and summed up when it is read.
"""

from collections import Counter

from multilora.front.observer import Ending, FirstOutput
from multilora.server.metrics import buckets
from multilora.server.metrics.drafts import DraftCounts
from multilora.server.metrics.histogram import Histogram
from multilora.server.metrics.top_names import TopNames
from multilora.server.metrics.usage import Usage, inter_token_histogram

REASONS = ("stop", "length", "abort", "error")
"""How a sample can end: the types of `front.stream.FinishReason`."""


class Totals:
    """Counters only grow. context_length: bounds the buckets of tokens; adapters: what is counted by adapter."""

    def __init__(self, context_length: int, adapters: TopNames[Usage]):
        self._adapters = adapters
        self.prompt_tokens = self.cached_tokens = 0
        self.drafts = DraftCounts()
        self.endings = Counter[str](dict.fromkeys(REASONS, 0))
        self.token_bounds = buckets.token_buckets(context_length)
        self.first_token = Histogram(buckets.VLLM_FIRST_TOKEN, buckets.SGLANG_FIRST_TOKEN)
        self.per_output_token = Histogram(buckets.VLLM_INTER_TOKEN, buckets.SGLANG_INTER_TOKEN)
        self.latency = Histogram(buckets.VLLM_LATENCY, buckets.SGLANG_LATENCY)
        self.queue = Histogram(buckets.VLLM_LATENCY)
        self.prefill = Histogram(buckets.VLLM_LATENCY)
        self.decode = Histogram(buckets.VLLM_LATENCY)
        self.inference = Histogram(buckets.VLLM_LATENCY)
        self.request_prompt = Histogram(self.token_bounds)
        self.request_generated = Histogram(self.token_bounds)
        self.request_max_tokens = Histogram(self.token_bounds)
        self.request_n = Histogram(buckets.VLLM_SAMPLES)

    @property
    def generated_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(usage.generated_tokens for usage in self._adapters.series())

    @property
    def inter_token(self) -> Histogram:
        """Times between two tokens of an answer, so far."""
        total = inter_token_histogram()
        for usage in self._adapters.series():
            total.absorb(usage.inter_token)
        return total

    def first_output(self, output: FirstOutput) -> None:
        """Count the prompt and what came of it at once."""
        self.prompt_tokens += output.prompt_tokens
        self.cached_tokens += output.cached_tokens
        self.first_token.observe(output.seconds)

    def ended(self, ending: Ending) -> None:
        """Count a sample that has ended; its times only if it ever ran."""
        self.endings[ending.reason] += 1
        self.request_prompt.observe(ending.prompt_tokens)
        self.request_generated.observe(ending.generated)
        self.request_n.observe(ending.n)
        if ending.max_tokens is not None:
            self.request_max_tokens.observe(ending.max_tokens)
        if not ending.first_seconds:
            return
        # arrival ─ queue ─ first step ─ prefill ─ first token ─ decode ─ last token
        decode = ending.seconds - ending.first_seconds
        prefill = max(0.0, ending.first_seconds - ending.queue_seconds)
        self.latency.observe(ending.seconds)
        self.queue.observe(ending.queue_seconds)
        self.prefill.observe(prefill)
        self.decode.observe(decode)
        self.inference.observe(prefill + decode)
        self.per_output_token.observe(decode / (ending.generated - 1) if ending.generated > 1 else 0.0)
