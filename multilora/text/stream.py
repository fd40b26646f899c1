"""One request's outputs as text: the tokens of the engine in, what the client may see out.

Sans-IO. Used by the server (one TextStream per choice) and by `LLM`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from multilora.engine.messages import Output, TopLogprobs
from multilora.params import SamplingParams
from multilora.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class FinishReason:
    type: Literal["stop", "length", "abort", "error"]
    matched: int | str | None = None
    length: int | None = None
    message: str = ""
    kind: str = ""

    def native(self) -> dict[str, Any]:
        raise NotImplementedError

    def openai(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Delta:
    text: str
    token_ids: list[int]
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    input_logprobs: list[float | None] | None = None
    input_top_logprobs: list[TopLogprobs | None] | None = None
    finished: FinishReason | None = None
    drop: bool = False


class TextStream:
    text: str
    token_ids: list[int]
    finished: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    logprobs: list[float] | None
    top_logprobs: list[TopLogprobs] | None
    input_logprobs: list[float | None] | None
    input_top_logprobs: list[TopLogprobs | None] | None

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_ids: list[int],
        eos_token_ids: Sequence[int] = (),
    ):
        raise NotImplementedError

    def push(self, output: Output) -> Delta:
        raise NotImplementedError
