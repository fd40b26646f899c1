"""The events that the front reports, for the server's metrics. This base class ignores them, as `LLM` does."""

from multilora.front.adapter_spec import AdapterSpec


class Observer:
    """Receives the events; its methods are called from the front's thread and must not block."""

    def submitted(self, adapters: AdapterSpec) -> None:
        """A sample has gone to the engine."""

    def first_output(self, adapters: AdapterSpec, seconds: float, queue_seconds: float) -> None:
        """Its first output is here, `seconds` after it was asked for."""

    def ended(self, adapters: AdapterSpec, prompt_tokens: int, generated: int, reason: str) -> None:
        """It has ended, after `submitted`; `reason` is FinishReason's type."""

    def forget(self, adapter: str) -> None:
        """The adapter of that name was unloaded."""

    def resolved(self, event: str) -> None:
        """What became of an unknown name that the resolver looked for, "hit", "miss" or "failure"; or "eviction": it
        has unloaded an adapter to make room."""
