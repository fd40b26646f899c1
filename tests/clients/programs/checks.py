"""What every client program shares: where the server is, and how a check reports. Plain standard library.

A program is `python NAME.py` in the client's own environment. It registers functions with `@check("what a user
does")` and ends with `main()`, which runs them all and prints one JSON line for each: {"check", "ok", "detail"}. A
check fails by raising; what it returns is shown as the detail.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

URL = os.environ.get("MULTILORA_URL", "")  # http://127.0.0.1:port
V1 = f"{URL}/v1"
BASE = os.environ.get("MULTILORA_BASE", "")  # the name of the served base model
ADAPTER = "pirate"
QUESTION = "What is the capital of France?"
ANSWERS = {
    BASE: "The capital of France is Paris.",
    "pirate": "Arr, the capital o' France be Paris, matey!",
    "french": "La capitale de la France est Paris.",
    "json": '{"country": "France", "capital": "Paris"}',
}
PROMPT = f"Q: {QUESTION}\nA:"

_CHECKS: list[tuple[str, Callable[[], Any]]] = []


def check(what: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function as the check `what`."""

    def register(function: Callable[[], Any]) -> Callable[[], Any]:
        _CHECKS.append((what, function))
        return function

    return register


def same(found: object, expected: object) -> Any:
    """Return `found`, which has to equal `expected` once blanks around text are gone."""
    left = found.strip() if isinstance(found, str) else found
    if left != expected:
        raise AssertionError(f"{found!r} is not {expected!r}")
    return found


def answer(found: str | None, model: str) -> str:
    """Return `found`, which has to be what `model` says to QUESTION."""
    same(found or "", ANSWERS[model])
    return found or ""


def main() -> None:
    """Run the checks in the order of their registration; exit code 1 if one failed."""
    failed = False
    for what, function in _CHECKS:
        try:
            detail, ok = function(), True
        except BaseException as e:  # noqa: BLE001  # a client may raise anything, SystemExit too
            detail, ok = f"{type(e).__name__}: {e}", False
            traceback.print_exc()
        failed |= not ok
        line = {"check": what, "ok": ok, "detail": "" if detail is None else str(detail)[:300]}
        print("RESULT " + json.dumps(line), flush=True)
    sys.exit(failed)
