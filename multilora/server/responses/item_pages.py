"""The input items of a response, as `GET /v1/responses/{id}/input_items` lists them: with ids, page by page."""

from collections.abc import Sequence
from typing import Any

from multilora.errors import BadRequest
from multilora.server.responses.output import new_id

MAX_PAGE = 100
DEFAULT_PAGE = 20
_PREFIXES = {"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def with_id(item: Any) -> Any:
    """The item with an id of ours, if its client gave it none."""
    if not isinstance(item, dict) or item.get("id"):
        return item
    return item | {"id": new_id(_PREFIXES.get(str(item.get("type")), "msg"))}


def page(items: Sequence[dict[str, Any]], after: str | None, limit: int | None, order: str | None) -> dict[str, Any]:
    """So many items behind the one with the id `after`. order: desc, the last item first, or asc. Raises
    BadRequest."""
    size = DEFAULT_PAGE if limit is None else limit
    if not 1 <= size <= MAX_PAGE:
        raise BadRequest(f"limit: must be in [1, {MAX_PAGE}], not {size}", param="limit")
    if order not in (None, "asc", "desc"):
        raise BadRequest(f"order: {order!r:.80} must be asc or desc", param="order")
    ordered = list(items) if order == "asc" else list(reversed(items))
    start = 0
    if after is not None:
        start = next((i + 1 for i, item in enumerate(ordered) if item["id"] == after), 0)
        if not start:
            raise BadRequest(f"after: no input item has the id {after!r:.100}", param="after")
    found = [_shown(item) for item in ordered[start : start + size]]
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": start + size < len(ordered),
    }


def _shown(item: dict[str, Any]) -> dict[str, Any]:
    """With the fields that clients read, where the short form of an item leaves them out."""
    if item.get("type", "message") != "message":
        return item
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    content = item["content"]
    if isinstance(content, str):
        content = [{"type": kind, "text": content} | ({"annotations": []} if kind == "output_text" else {})]
    return {"type": "message", "status": "completed"} | item | {"content": content}
