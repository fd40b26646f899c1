"""What one step does: frozen, made by the scheduler, read by the runner, given back at commit."""

from dataclasses import dataclass

from multilora.engine.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of one request. sample: it ends at the last token, so a new one follows."""

    request: Request
    epoch: int  # of the request when planned: another one means it was preempted since
    start: int
    count: int
    sample: bool
    known: bool  # its tokens are; else it is one token that the step before is still sampling
    answer_index: int  # of the token that is sampled, within the answer
    slots: tuple[int, ...]  # of the adapters that act on it, in the LoRA table
    weights: tuple[float, ...]  # of each
    pre_activation: int  # so many of its first tokens come before activation: no adapter acts on them
    logprob_positions: range  # prompt positions whose logits are wanted

    @property
    def decodes(self) -> bool:
        """It is the one new token of an answer, not a piece of a prompt."""
        return self.count == 1 and self.request.decoding_chunk(self.start)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Chunks ordered by adapter, base first. Steps are numbered from 1."""

    number: int
    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        return sum(c.count for c in self.chunks)

    @property
    def prompt_tokens(self) -> int:
        return sum(c.count for c in self.chunks if not c.decodes)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a plan, on the host. Lists run parallel to the chunks that sample, in plan order.

    prompt_logprobs, prompt_top_logprobs: per chunk of the plan, parallel to its `logprob_positions`.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top_logprobs: list[list[tuple[float, int]] | None]
    errors: list[str | None]
    prompt_logprobs: list[list[float | None]]
    prompt_top_logprobs: list[list[list[tuple[float, int]]]]
