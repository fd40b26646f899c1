"""What the ingress reads of a request to route it: which adapter it names, how its prompt begins, its session.

Nothing is refused here, and nothing changed: a body that is not understood goes where there is least to do, and the
replica that gets it says what is wrong with it.
"""

import json
from collections.abc import Collection, Mapping
from enum import Enum
from itertools import islice
from typing import Any

from starlette.datastructures import Headers

from multilora.cluster.cluster_table import ClusterTable
from multilora.cluster.route_request import AdapterNeed, RouteRequest, prefix_keys
from multilora.front.access import Caller
from multilora.front.adapter_names import DEFAULT_MODEL
from multilora.front.adapter_spec import names_in
from multilora.server.access_rules import Need, rule_of

SESSION_HEADER = "x-session-id"
LONGEST_READ = 8 << 20
"""Bytes of a longer body are not parsed: it goes by its headers alone."""
PROMPT_CHARS = 40_000
TOKEN_CHARS = 4
"""Characters of text for each token, about: only how prompts compare counts."""


class Reach(Enum):
    """Whom a request concerns."""

    ONE = "one replica"
    ALL = "every replica, as it changes each of them"
    SUM = "every replica, whose answers are put together"


_SUMMED = frozenset({"/metrics", "/v1/loads"})


def reach_of(path: str) -> Reach:
    """By the route. Changes of adapters are one replica's, which has the registry tell the others."""
    path = path.rstrip("/")
    if path in _SUMMED:
        return Reach.SUM
    rule = rule_of(path)
    return Reach.ALL if rule.need in (Need.ADMIN, Need.ABORTS) else Reach.ONE


def read_request(
    scope: Mapping[str, Any], body: bytes, table: ClusterTable, model_name: str, caller: Caller
) -> RouteRequest:
    """caller: whose names the request uses."""
    headers = Headers(raw=scope["headers"])
    session = headers.get(SESSION_HEADER, "")
    content: Any = None
    if body and len(body) <= LONGEST_READ and scope["method"] == "POST":
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
    if not isinstance(content, dict):
        return RouteRequest(session=_own(caller, session))
    key = content.get("prompt_cache_key")
    session = session or (key if isinstance(key, str) else "")
    need = _adapter(content, table, model_name, caller)
    scoped = f"{caller.tenant.name}\0{need.name if need else ''}\0{need.version if need else 0}"
    prompt = _prompt(content)
    return RouteRequest(
        need, 1.0, _tokens(content, prompt), prefix_keys(scoped, prompt), session=_own(caller, session)
    )


def _tokens(content: dict[str, Any], prompt: str) -> int:
    for name in ("input_ids", "prompt"):
        value = content.get(name)
        if isinstance(value, list) and value and all(isinstance(one, int) for one in islice(value, 8)):
            return len(value)
    return len(prompt) // TOKEN_CHARS


def _own(caller: Caller, session: str) -> str:
    """Sessions of two tenants that call theirs alike are two."""
    return f"{caller.tenant.name}\0{session[:256]}" if session else ""


def _adapter(content: dict[str, Any], table: ClusterTable, model_name: str, caller: Caller) -> AdapterNeed | None:
    model, names = content.get("model"), list[str]()
    if isinstance(model, str) and model not in ("", DEFAULT_MODEL, model_name):
        names.append(model.removeprefix(f"{model_name}:"))
    names += islice(names_in(content.get("lora_path")), 8)
    if isinstance(content.get("lora_name"), str):  # a change of the adapter itself
        names = [content["lora_name"]]
    for name in names:
        own = caller.own_name(name)
        full = own if own in table.records else name
        record = table.records.get(full)
        if record is not None and record.parts:
            full = record.parts[0][0]
        if full:
            return AdapterNeed(full, table.version_of(full))
    return None


def _prompt(content: dict[str, Any]) -> str:
    for name in ("prompt", "text", "input", "query"):
        value = content.get(name)
        if isinstance(value, str):
            return value[:PROMPT_CHARS]
    messages = content.get("messages") or content.get("input_ids") or content.get("prompt")
    if not isinstance(messages, Collection):
        return ""
    text = str(content.get("system", ""))
    for part in islice(messages, 2048):
        text += str(part)
        if len(text) > PROMPT_CHARS:
            break
    return text[:PROMPT_CHARS]
