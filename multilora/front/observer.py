"""The events that the front reports, for the server's metrics. This base class ignores them, as `LLM` does."""

from dataclasses import dataclass

from multilora.front.adapter_spec import AdapterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstOutput:
    """What is known of a sample when its first output arrives.

    seconds: since the request arrived; queue_seconds: until its first step; generated: tokens of this output.
    """

    seconds: float
    queue_seconds: float
    prompt_tokens: int
    cached_tokens: int
    generated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What is known of a sample that has ended.

    reason: FinishReason's type; generated: tokens of the answer; n: as the client asked;
    max_tokens: too, at most the context's length (the client's number may have a thousand digits).
    seconds, first_seconds: from the request's arrival to its last and its first output, 0 where there was none;
    queue_seconds: until its first step.
    """

    reason: str
    prompt_tokens: int
    generated: int
    n: int
    max_tokens: int | None
    seconds: float
    first_seconds: float
    queue_seconds: float


class Observer:
    """Receives the events; its methods are called from the front's thread and must not block."""

    def submitted(self, adapters: AdapterSpec) -> None:
        """A sample has gone to the engine."""

    def first_output(self, adapters: AdapterSpec, output: FirstOutput) -> None:
        """A sample's first output is here."""

    def next_output(self, tokens: int, seconds: float) -> None:
        """A later output brought `tokens` (at least one), `seconds` after the output before it."""

    def ended(self, adapters: AdapterSpec, ending: Ending) -> None:
        """A sample that was `submitted` has ended."""

    def forget(self, adapter: str) -> None:
        """The adapter of that name was unloaded."""

    def resolved(self, event: str) -> None:
        """What became of an unknown name that the resolver looked for, "hit", "miss" or "failure"; or "eviction": it
        has unloaded an adapter to make room."""
