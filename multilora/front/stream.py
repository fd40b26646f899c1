"""One request's outputs as text: the engine's tokens in, what the client may see out.

Owns the text, the stop strings and the one ending of its request: where a stop string is complete, text, tokens and
logprobs are cut after the token that completed it. Sans-IO: the caller sends `Finish` when a Delta says `drop`.
One TextStream belongs to one sample of a request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from multilora.engine.messages import Logprobs, Output
from multilora.errors import BadRequest
from multilora.front.detokenizer import Detokenizer
from multilora.front.stop import StopMatch, StopMatcher
from multilora.front.tokenizer import Tokenizer
from multilora.params import SamplingParams


@dataclass(frozen=True)
class FinishReason:
    """matched: the EOS or stop token id, the stop string, or the text that a stop_regex matched; length: tokens
    generated, for "length"; message, and kind (an error's class name), for "abort" and "error"."""

    type: Literal["stop", "length", "abort", "error"]
    matched: int | str | None = None
    length: int | None = None
    message: str = ""
    kind: str = ""

    def native(self) -> dict[str, Any]:
        """As `finish_reason` of the native routes."""
        match self.type:
            case "stop":
                return {"type": "stop", "matched": self.matched}
            case "length":
                return {"type": "length", "length": self.length}
            case "abort":
                return {"type": "abort", "message": self.message}
            case "error":
                return {"type": "error", "message": self.message, "kind": self.kind}

    def openai(self) -> str:
        """As `finish_reason` of the OpenAI routes, which know no "error"."""
        return "abort" if self.type == "error" else self.type


class Delta(msgspec.Struct, frozen=True):
    """What one Output added. `drop`: the stream ended here and the engine does not know yet: send it Finish(rid)."""

    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] = []
    input_logprobs: list[Logprobs | None] = []
    finished: FinishReason | None = None
    drop: bool = False

    def then(self, later: "Delta") -> "Delta":
        """What both added, one after the other."""
        return Delta(
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            input_logprobs=self.input_logprobs + later.input_logprobs,
            finished=later.finished,
            drop=later.drop,
        )


class TextStream:
    """Cumulative: text, token_ids, logprobs, …; `tokenizer` None: ids only, no text and no stop strings.

    kept: special tokens that `skip_special_tokens` does not skip. Raises BadRequest when made with a bad stop_regex.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        eos_token_ids: Sequence[int] = (),
        kept: Sequence[str] = (),
    ):
        self.params = params
        self._made_of = (tokenizer, params, eos_token_ids, kept)
        self.cached_tokens = 0
        self.token_ids: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.input_logprobs: list[Logprobs | None] = []
        self.pooled = b""  # what has been made of the prompt, if that was all that was wanted
        self.finished: FinishReason | None = None
        self._eos_token_ids = frozenset(eos_token_ids)
        self._pieces: list[str] = []  # join to what is out
        self._out = 0  # characters of it
        self._held = ""  # text after it: perhaps the beginning of a stop
        self._detokenizer = None if tokenizer is None else _detokenizer(tokenizer, params, kept)
        self._matcher: StopMatcher | None = None
        self.has_stops = False  # whether text can end it
        if params.stop_strings or params.stop_regexes:
            if tokenizer is None:
                raise BadRequest("stop strings need a tokenizer; this server runs without one", param="stop")
            self._matcher = StopMatcher(params.stop_strings, params.stop_regexes)
            self.has_stops = True

    def renewed(self) -> "TextStream":
        """A stream of the same request that has read nothing."""
        return TextStream(*self._made_of)

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    def push(self, output: Output) -> Delta:
        """Take an Output of this request. Nothing may follow the Delta that carries `finished`."""
        assert self.finished is None, f"request {output.rid}: output after its end"
        if output.finished is None and self._matcher is None:
            return self.push_endless(output)
        count = len(output.token_ids)
        reason = self._engine_reason(output)
        readable = output.token_ids
        if reason is not None and reason.matched is not None and not self.params.no_stop_trim:
            readable = readable[:-1]  # all but the EOS or stop token
        try:
            read, match = self._read(readable, last=reason is not None)
        except BadRequest as e:  # a stop_regex takes too long
            reason, match = FinishReason("error", message=e.message, kind=e.kind), None
        text = self._take_text(match, last=reason is not None)
        if match is not None:
            count, reason = read, FinishReason("stop", matched=match.matched)
        self.finished = reason
        return self._extend(output, count, text)

    def push_endless(self, output: Output) -> Delta:
        """The same of an Output that cannot end a stream without stops, as nearly all are: so it is short."""
        ids = output.token_ids
        text = "" if self._detokenizer is None else self._detokenizer.push(ids)
        if text:
            self._pieces.append(text)
            self._out += len(text)
        self.token_ids += ids
        if output.logprobs:
            self.logprobs += output.logprobs
        if output.input_logprobs:
            self.input_logprobs += output.input_logprobs
        if output.cached_tokens > self.cached_tokens:
            self.cached_tokens = output.cached_tokens
        return Delta(text, ids, output.logprobs, output.input_logprobs)

    def _engine_reason(self, output: Output) -> FinishReason | None:
        """How the engine ended the request, if it did. `matched` is set only when the last token is that id."""
        end = output.finished
        if end is None:
            return None
        match end.type:
            case "stop":
                last = output.token_ids[-1] if output.token_ids else None
                known = end.matched is None and last in self._eos_token_ids
                return FinishReason("stop", matched=last if known else end.matched)
            case "length":
                return FinishReason("length", length=self.completion_tokens + len(output.token_ids))
            case "abort" | "error":
                return FinishReason(end.type, message=end.message, kind=end.kind)

    def _read(self, token_ids: list[int], *, last: bool) -> tuple[int, StopMatch | None]:
        """Tokens to held text, up to the token that completes a stop. Returns how many were read, and the match."""
        if self._detokenizer is None:
            return len(token_ids), None
        if self._matcher is None:
            self._held += self._detokenizer.push(token_ids) + (self._detokenizer.finish() if last else "")
            return len(token_ids), None
        for read, token in enumerate(token_ids, 1):
            if match := self._feed(self._matcher, self._detokenizer.push([token]), read):
                return read, match
        if last and (match := self._feed(self._matcher, self._detokenizer.finish(), len(token_ids))):
            return len(token_ids), match
        return len(token_ids), None

    def _feed(self, matcher: StopMatcher, piece: str, read: int) -> StopMatch | None:
        self._held += piece
        return matcher.feed(piece, may_match=self.completion_tokens + read >= self.params.min_new_tokens)

    def _take_text(self, match: StopMatch | None, *, last: bool) -> str:
        """The part of the held text that may go out: up to the stop, everything at the end, else what is decided."""
        if match is not None:
            end = match.end if self.params.no_stop_trim else match.start
            size = max(0, end - self._out)
        else:
            undecided = self._matcher.held if self._matcher is not None and not last else 0
            size = len(self._held) - undecided
        text, self._held = self._held[:size], self._held[size:]
        self._out += len(text)
        if text:
            self._pieces.append(text)
        return text

    def _extend(self, output: Output, count: int, text: str) -> Delta:
        """Add the first `count` tokens of the output, and what comes with them, to the totals."""
        if output.cached_tokens > self.cached_tokens:
            self.cached_tokens = output.cached_tokens
        drop = self.finished is not None and output.finished is None
        self.pooled = output.pooled or self.pooled
        delta = Delta(
            text, output.token_ids[:count], output.logprobs[:count], output.input_logprobs, self.finished, drop
        )
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.input_logprobs += delta.input_logprobs
        return delta


def _detokenizer(tokenizer: Tokenizer, params: SamplingParams, kept: Sequence[str]) -> Detokenizer:
    return Detokenizer(tokenizer, params.skip_special_tokens, params.spaces_between_special_tokens, kept)
