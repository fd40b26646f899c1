"""The events that the front reports, for the server's metrics. This base class ignores them, as `LLM` does."""

from dataclasses import dataclass

from multilora.front.access import Caller
from multilora.front.adapter_spec import AdapterSpec


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose request it is. adapter: full name of the adapter that it counts for, "" for the base model; tenant: the
    caller's, "" for an admin or without tenants."""

    adapter: str
    tenant: str


def origin_of(caller: Caller, adapters: AdapterSpec) -> Origin:
    """A composition that a client has put together counts for the first of its adapters by name: once, so that the
    counts of all adapters are the total, and without a name of its own, of which there could be any number."""
    return Origin(min((name for name, _ in adapters), default=""), caller.tenant.name)


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

    reason: FinishReason's type; error: the error's kind where that is "error", else ""; generated: tokens of the
    answer; n: as the client asked; max_tokens: too, at most the context's length (the client's number may have a
    thousand digits).
    seconds, first_seconds: from the request's arrival to its last and its first output, 0 where there was none;
    queue_seconds: until its first step.
    """

    reason: str
    error: str
    prompt_tokens: int
    generated: int
    n: int
    max_tokens: int | None
    seconds: float
    first_seconds: float
    queue_seconds: float


class Observer:
    """Receives the events; its methods are called from the front's thread and must not block."""

    def submitted(self, origin: Origin) -> None:
        """A sample has gone to the engine."""

    def first_output(self, origin: Origin, output: FirstOutput) -> None:
        """A sample's first output is here."""

    def next_output(self, origin: Origin, tokens: int, seconds: float) -> None:
        """A later output brought `tokens` (at least one), `seconds` after the output before it."""

    def verified(self, origin: Origin, drafted: int, accepted: int) -> None:
        """An output brought what came of a draft of `drafted` tokens: so many were right."""

    def ended(self, origin: Origin, ending: Ending) -> None:
        """A sample that was `submitted` has ended."""

    def refused(self, origin: Origin, error: str) -> None:
        """A job was not submitted, for an error of that kind. Its adapter may be gone."""

    def forget(self, adapter: str) -> None:
        """The adapter of that name was unloaded."""

    def resolved(self, event: str) -> None:
        """What became of an unknown name that the resolver looked for, "hit", "miss" or "failure"; or "eviction": it
        has unloaded an adapter to make room."""
