"""Stored responses: what is kept, and who leaves when there is too much.

Covers `responses/store.py` too.
"""

from typing import Any

import pytest

from multilora.errors import UnknownResponse
from multilora.server.responses.store import ResponseStore, json_bytes


class EndedRun:
    """A run whose response is what the test says."""

    def __init__(self, name: str, text: str = ""):
        self._name, self._text = name, text

    def response(self) -> dict[str, Any]:
        return {"id": self._name, "output": [{"id": f"item of {self._name}", "text": self._text}]}


def put(store: ResponseStore, name: str, text: str = "", nbytes: int = 0) -> None:
    store.add(name, EndedRun(name, text), [f"input of {name}"], nbytes)  # type: ignore[arg-type]
    store.settle(("", name))


def known(store: ResponseStore, names: str) -> str:
    def is_known(name: str) -> bool:
        try:
            store.get(name)
        except UnknownResponse:
            return False
        return True

    return "".join(filter(is_known, names))


def test_the_least_recently_used_leaves_first():
    store = ResponseStore(max_count=2)
    put(store, "a")
    put(store, "b")
    store.get("a")
    put(store, "c")
    assert known(store, "abc") == "ac" and len(store) == 2
    assert store.item("item of b") is None and store.item("item of a") == {"id": "item of a", "text": ""}


def test_bytes_count_with_the_conversation_before():
    one = json_bytes(EndedRun("a").response())
    store = ResponseStore(max_bytes=2 * one + 10)
    put(store, "a")
    put(store, "b", nbytes=10)
    assert known(store, "ab") == "ab"
    put(store, "c", nbytes=11)
    assert known(store, "abc") == "c"
    put(store, "d", "x" * 3 * one)
    assert known(store, "abcd") == "" and len(store) == 0


def test_what_runs_stays_and_has_no_items_yet():
    store = ResponseStore(max_count=1)
    store.add("a", EndedRun("a"), [], 0)  # type: ignore[arg-type]
    put(store, "b")
    put(store, "c")
    assert known(store, "abc") == "ac" and store.get("a").run is not None
    assert store.item("item of a") is None
    store.settle(("", "a"))
    assert known(store, "abc") == "a" and store.get("a").items == [{"id": "item of a", "text": ""}]


def test_what_is_discarded_while_it_runs_stays_unknown():
    store = ResponseStore()
    store.add("a", EndedRun("a"), [], 0)  # type: ignore[arg-type]
    store.discard("a")
    store.settle(("", "a"))
    with pytest.raises(UnknownResponse, match="'a'"):
        store.get("a")
