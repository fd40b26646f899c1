"""The parts of an answer as output items of the Responses API, with the events that a stream sends of them.

An item is opened by its first part and closed by the next item or by the end. Owns the items and their ids; knows
nothing of requests, sequence numbers or the response around the items.
"""

import uuid
from collections.abc import Iterator
from typing import Any

from multilora.front.tools.base import Call, Content, Part, Reasoning
from multilora.server.streaming import StreamEvent


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{uuid.uuid4().hex}"


class OutputItems:
    """The items of one response."""

    def __init__(self) -> None:
        self._items: list[dict[str, Any]] = []
        self._open = False  # the last item may go on
        self._pieces: list[str] = []  # of the open item's text

    def items(self) -> list[dict[str, Any]]:
        """All items so far, the open one with the text that is there."""
        if self._open:
            self._part["text"] = "".join(self._pieces)
        return self._items

    def push(self, part: Part, logprobs: list[dict[str, Any]]) -> Iterator[StreamEvent]:
        """The events that the next part makes. logprobs: of the tokens of a Content."""
        match part:
            case Content(text):
                yield from self._text("message", text, logprobs)
            case Reasoning(text):
                yield from self._text("reasoning", text, [])
            case Call():
                yield from self.close("completed")
                yield from self._call(part)

    def finish(self, status: str, logprobs: list[dict[str, Any]]) -> Iterator[StreamEvent]:
        """The events of the end. An answer without anything is an empty message. status: of an item that is open.
        logprobs: of the last tokens, which have no text."""
        if not self._items:
            yield from self._begin("message")
        if self._open and self._item["type"] == "message":
            self._part["logprobs"] += logprobs
        yield from self.close(status)

    def close(self, status: str) -> Iterator[StreamEvent]:
        """The events that end the open item; none if there is none."""
        if not self._open:
            return
        item, part = self.items()[-1], self._part
        self._open = False
        done = self._event("done", text=part["text"])
        if item["type"] == "message":
            done["logprobs"] = part["logprobs"]
        yield done
        yield self._event("response.content_part.done", part=part)
        item["status"] = status
        yield self._item_event("response.output_item.done")

    @property
    def _item(self) -> dict[str, Any]:
        return self._items[-1]

    @property
    def _part(self) -> dict[str, Any]:
        """The only content part of the last item."""
        part: dict[str, Any] = self._item["content"][0]
        return part

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[StreamEvent]:
        if not self._open or self._item["type"] != kind:
            yield from self.close("completed")
            yield from self._begin(kind)
        self._pieces.append(text)
        delta = self._event("delta", delta=text)
        if kind == "message":
            self._part["logprobs"] += logprobs
            delta["logprobs"] = logprobs
        yield delta

    def _begin(self, kind: str) -> Iterator[StreamEvent]:
        """Open an item that has text."""
        item: dict[str, Any]
        if kind == "message":
            item = {"id": new_id("msg"), "type": kind, "status": "in_progress", "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": new_id("rs"), "type": kind, "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        self._items.append(item)
        yield self._item_event("response.output_item.added")
        item["content"].append(part)
        self._open, self._pieces = True, []
        yield self._event("response.content_part.added", part=part)

    def _call(self, call: Call) -> Iterator[StreamEvent]:
        item = {
            "id": new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        self._items.append(item)
        yield self._item_event("response.output_item.added")
        where = {"item_id": item["id"], "output_index": len(self._items) - 1}
        yield {"type": "response.function_call_arguments.delta", "delta": call.arguments} | where
        whole = {"name": call.name, "arguments": call.arguments}
        yield {"type": "response.function_call_arguments.done"} | whole | where
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._item_event("response.output_item.done")

    def _event(self, kind: str, **fields: Any) -> StreamEvent:
        """An event about the part of the last item. kind: "delta" and "done" are about its text."""
        if kind in ("delta", "done"):
            kind = f"response.{self._part['type']}.{kind}"
        where = {"item_id": self._item["id"], "output_index": len(self._items) - 1, "content_index": 0}
        return {"type": kind} | where | fields

    def _item_event(self, kind: str) -> StreamEvent:
        return {"type": kind, "output_index": len(self._items) - 1, "item": self._item}
