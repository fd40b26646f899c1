"""What the Python doors answer with."""

from dataclasses import dataclass, field

from multilora.engine.messages import TopLogprobs
from multilora.front.generation import Sample
from multilora.front.stream import FinishReason
from multilora.front.versions import DEFAULT_WEIGHT_VERSION, VersionSpan


@dataclass(frozen=True)
class Completion:
    """One answer, or what there is of it so far: then `finished` is False and `finish_reason` None.

    request_id: the caller's, with `#` and `index` behind it where there are several answers; index: which of the `n`
    to its prompt. Logprobs are natural logarithms, only when asked for: of the answer's tokens under the distribution
    that `logprobs_mode` names, of the prompt's under the raw one. weight_version,
    lora_version: which weights its last token comes from, see `front/versions.py`; weight_versions: all of them, in
    several spans where an adapter was replaced on the way.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[float | None] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    input_logprobs: list[float | None] | None = None
    input_top_logprobs: list[TopLogprobs | None] | None = None
    request_id: str = ""
    index: int = 0
    weight_version: str = DEFAULT_WEIGHT_VERSION
    lora_version: int | None = None
    weight_versions: list[VersionSpan] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @classmethod
    def of(cls, sample: Sample) -> "Completion":
        """A copy of all that the sample has now."""
        stream = sample.stream
        return cls(
            text=stream.text,
            token_ids=list(stream.token_ids),
            finish_reason=stream.finished,
            prompt_tokens=len(sample.prompt_ids),
            cached_tokens=stream.cached_tokens,
            logprobs=[one.logprob for one in stream.logprobs] or None,
            top_logprobs=[one.top for one in stream.logprobs] or None,
            input_logprobs=[None if one is None else one.logprob for one in stream.input_logprobs] or None,
            input_top_logprobs=[None if one is None else one.top for one in stream.input_logprobs] or None,
            request_id=sample.rid,
            index=sample.number,
            weight_version=sample.label.weight_version,
            lora_version=sample.label.lora_version,
            weight_versions=sample.version_spans,
        )
