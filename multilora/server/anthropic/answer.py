"""One answer in the words of the Messages API: the events of a stream, and the message that they add up to.

Whoever iterates `events` drives the answer; whole answers iterate too, and drop them. Knows nothing of HTTP.
"""

import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from multilora.drivers.async_generation import AsyncGeneration
from multilora.errors import MultiloraError
from multilora.front.generation import Sample
from multilora.front.stream import FinishReason
from multilora.front.tools import json_text
from multilora.front.tools.base import Call, Content, Part, Reasoning, SettledParts
from multilora.server.chat_job import ChatJob
from multilora.server.streaming import StreamEvent
from multilora.server.weight_versions import all_weights


class MessageAnswer:
    """model: as the client has named it. max_tokens: as the client has limited the answer."""

    def __init__(self, chat: ChatJob, generation: AsyncGeneration, model: str, max_tokens: int):
        self._chat = chat
        self._generation = generation
        self.close = generation.close
        self._model = model
        self._max_tokens = max_tokens
        self._id = f"msg_{uuid.uuid4().hex}"
        self._blocks: list[dict[str, Any]] = []
        self._open = False  # the last block may go on
        self._pieces: list[str] = []  # of the open block's text
        self._ending: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def message(self) -> dict[str, Any]:
        """The message, once all events have been."""
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        sample = self._generation.samples[0]
        return head | {"content": self._blocks} | self._ending | {"usage": _usage(sample)} | all_weights(sample)

    async def events(self) -> AsyncGenerator[StreamEvent, None]:
        """All events, in order. Raises the typed error of an answer that fails or is aborted."""
        parts = SettledParts()
        started = False
        async for sample, delta in self._generation.events():
            if not started:
                started = True
                yield {"type": "message_start", "message": self.message() | {"usage": _usage(sample, written=0)}}
                yield {"type": "ping"}
            for part in parts.push(self._chat.events(sample, delta)):
                for event in self._push(part):
                    yield event
            if delta.finished is not None:
                for event in self._finish(sample, delta.finished):
                    yield event

    def _push(self, part: Part) -> Iterator[StreamEvent]:
        match part:
            case Content(text):
                yield from self._text("text", text)
            case Reasoning(text):
                yield from self._text("thinking", text)
            case Call(call_id, name, arguments):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                yield from self._begin(block)
                yield self._delta("input_json_delta", "partial_json", arguments)
                block["input"] = json_text.load_object(arguments)
                yield from self._close()

    def _text(self, kind: str, text: str) -> Iterator[StreamEvent]:
        """Text of a block whose type is also the name of its field."""
        if not self._open or self._blocks[-1]["type"] != kind:
            block = {"type": kind, kind: ""}
            yield from self._begin(block if kind == "text" else block | {"signature": ""})
        self._pieces.append(text)
        yield self._delta(f"{kind}_delta", kind, text)

    def _begin(self, block: dict[str, Any]) -> Iterator[StreamEvent]:
        yield from self._close()
        self._blocks.append(block)
        self._open, self._pieces = True, []
        yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}

    def _close(self) -> Iterator[StreamEvent]:
        if not self._open:
            return
        self._open = False
        block = self._blocks[-1]
        if block["type"] == "thinking":
            block["signature"] = uuid.uuid4().hex  # clients drop thoughts without one; nobody here checks it
            yield self._delta("signature_delta", "signature", block["signature"])
        if block["type"] != "tool_use":
            block[block["type"]] = "".join(self._pieces)
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, kind: str, field: str, text: str) -> StreamEvent:
        delta = {"type": kind, field: text}
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _finish(self, sample: Sample, finished: FinishReason) -> Iterator[StreamEvent]:
        yield from self._close()
        self._ending = self._ending_of(sample, finished)
        yield {"type": "message_delta", "delta": self._ending, "usage": _usage(sample)} | all_weights(sample)
        yield {"type": "message_stop"}

    def _ending_of(self, sample: Sample, finished: FinishReason) -> dict[str, Any]:
        if finished.type == "abort":
            raise MultiloraError(f"the request was aborted: {finished.message}")
        if finished.type == "length":
            cut = sample.stream.completion_tokens < self._max_tokens
            return self._ending | {"stop_reason": "model_context_window_exceeded" if cut else "max_tokens"}
        if any(block["type"] == "tool_use" for block in self._blocks):
            return self._ending | {"stop_reason": "tool_use"}
        if isinstance(finished.matched, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": finished.matched}
        return self._ending | {"stop_reason": "end_turn"}


def _usage(sample: Sample, written: int | None = None) -> dict[str, Any]:
    """Token counts. written: how many are generated, if not as many as are there."""
    cached = sample.stream.cached_tokens
    return {
        "input_tokens": len(sample.prompt_ids) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": sample.stream.completion_tokens if written is None else written,
    }
