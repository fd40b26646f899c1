"""The OpenAPI document: what FastAPI derives from the routes, and what it cannot know of them.

Adds the meaning and the bounds of fields (`openapi_fields.py`), the answers with their event streams, the errors, and
who needs which key. Made on a thread when it is first asked for. Installed by `server/app.py`.
"""

import threading
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from multilora.params import SamplingParams
from multilora.server.access_rules import Need, rule_of
from multilora.server.anthropic.errors import SHAPES
from multilora.server.openapi_fields import FIELDS

Node = dict[str, Any]


def _object(description: str, **properties: Node) -> Node:
    return {"type": "object", "description": description, "properties": properties}


def _list_of(item: Node) -> Node:
    return {"type": "array", "items": item}


def _ref(name: str) -> Node:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT, _INTEGER, _NUMBER, _OBJECT = ({"type": kind} for kind in ("string", "integer", "number", "object"))
_OPTIONAL_TEXT = {"type": ["string", "null"]}
_USAGE = _object("Counts of tokens.", prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_META = _object(
    "About the answer.",
    id=_TEXT,
    finish_reason={"type": ["object", "null"], "description": "stop with what matched, length, or abort"},
    prompt_tokens=_INTEGER,
    completion_tokens=_INTEGER,
    cached_tokens=_INTEGER,
    e2e_latency=_NUMBER,
)


def _openai(description: str, **choice: Node) -> Node:
    choices = _list_of(_object("One answer.", index=_INTEGER, finish_reason=_OPTIONAL_TEXT, **choice))
    return _object(description, id=_TEXT, object=_TEXT, created=_INTEGER, model=_TEXT, choices=choices, usage=_USAGE)


SCHEMAS: dict[str, Node] = {
    "Error": _object(
        "Every error but those of SGLang's two adapter routes.",
        error=_object("What is wrong.", message=_TEXT, type=_TEXT, param=_OPTIONAL_TEXT, code=_TEXT),
    ),
    "Generated": _object(
        "An answer; in a stream, all of it so far.", text=_TEXT, output_ids=_list_of(_INTEGER), meta_info=_META
    ),
    "Completion": _openai("An answer; in a stream, what is new of it.", text=_TEXT),
    "ChatCompletion": _openai("An answer.", message=_OBJECT),
    "ChatCompletionChunk": _openai("What is new of an answer.", delta=_OBJECT),
    "AdapterResult": _object(
        "SGLang's, also of a failure, with status 400.",
        success={"type": "boolean"},
        error_message=_TEXT,
        loaded_adapters={"type": "object", "additionalProperties": _TEXT},
    ),
    "Response": _object(
        "OpenAI's response object.", id=_TEXT, object=_TEXT, status=_TEXT, output=_list_of(_OBJECT), usage=_OBJECT
    ),
    "Message": _object(
        "Anthropic's message.", id=_TEXT, type=_TEXT, content=_list_of(_OBJECT), stop_reason=_TEXT, usage=_OBJECT
    ),
    "NamedEvent": _object("One event of a stream; `type` is its name.", type=_TEXT),
    "MessageError": _object("Anthropic's.", type=_TEXT, error=_object("What is wrong.", type=_TEXT, message=_TEXT)),
    "Models": _object("The base model, then adapters.", object=_TEXT, data=_list_of(_OBJECT)),
}

ANSWERS: dict[str, tuple[Node, Node | None]] = {
    "/generate": ({"oneOf": [_ref("Generated"), _list_of(_ref("Generated"))]}, _ref("Generated")),
    "/v1/completions": (_ref("Completion"), _ref("Completion")),
    "/v1/chat/completions": (_ref("ChatCompletion"), _ref("ChatCompletionChunk")),
    "/v1/responses": (_ref("Response"), _ref("NamedEvent")),
    "/v1/responses/{response_id}/cancel": (_ref("Response"), None),
    "/v1/messages": (_ref("Message"), _ref("NamedEvent")),
    "/v1/messages/count_tokens": (_object("The count.", input_tokens=_INTEGER), None),
    "/load_lora_adapter": (_ref("AdapterResult"), None),
    "/load_lora_adapter_from_tensors": (_ref("AdapterResult"), None),
    "/unload_lora_adapter": (_ref("AdapterResult"), None),
    "/v1/models": (_ref("Models"), None),
}
"""The schemas of the answer and, where the route can stream, of one event of a stream, by path."""

PLAIN_TEXT = frozenset(
    [
        "/metrics",
        "/flush_cache",
        "/start_profile",
        "/stop_profile",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    ]
)

ERRORS = {
    "400": "A field of the request is wrong; `param` names it.",
    "401": "The key is missing or wrong.",
    "403": "The key may not do this, or not with this adapter.",
    "404": "There is no such model, adapter or path.",
    "413": "The body is too long.",
    "429": "The key or the adapter has used up what it may take; with Retry-After.",
    "503": "The queue is full (then with Retry-After), or the engine is gone.",
}

SCHEMES = {
    Need.SCRAPE: "metricsKey",
    Need.KEY: "apiKey",
    Need.OBSERVES: "apiKey",
    Need.LOADS: "adminKey",
    Need.ABORTS: "adminKey",
    Need.ADMIN: "adminKey",
}
"""The key that a route asks for, where it asks for one."""

KEYS = {
    "apiKey": "--api-key, or a key of --auth-file",
    "adminKey": "--admin-api-key, or --api-key where that is not set, or a key of --auth-file that may",
    "metricsKey": "--metrics-key, or the admin key",
}


def install(app: FastAPI) -> None:
    """Serve the completed document at /openapi.json, made on a thread: it takes a third of a second."""

    making = threading.Lock()  # one request makes it, the others wait on their threads

    def document() -> Node:
        with making:
            if not app.openapi_schema:
                made = get_openapi(title=app.title, version=app.version, routes=app.routes)
                app.openapi_schema = complete(made)
            return app.openapi_schema

    def answer(request: Request) -> Response:
        found, root = document(), request.scope.get("root_path", "").rstrip("/")
        return JSONResponse({**found, "servers": [{"url": root}]} if root else found)

    app.openapi = document  # type: ignore[method-assign]
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != app.openapi_url]
    app.add_route(str(app.openapi_url), answer, include_in_schema=False)


def complete(document: Node) -> Node:
    """Add to FastAPI's document, in place, what it cannot know."""
    components: Node = document["components"]
    schemas: Node = components["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):  # errors have one shape here
        schemas.pop(unused, None)
    for schema in schemas.values():
        _describe_fields(schema)
    schemas["SamplingParams"] = _sampling_params()
    if "GenerateBody" in schemas:
        one = _ref("SamplingParams")
        several = _list_of({"anyOf": [one, {"type": "null"}]})
        schemas["GenerateBody"]["properties"]["sampling_params"]["anyOf"] = [one, several, {"type": "null"}]
    schemas |= SCHEMAS
    components["securitySchemes"] = {
        name: {"type": "http", "scheme": "bearer", "description": flag} for name, flag in KEYS.items()
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _describe_operation(path, operation)
    return document


def _describe_fields(schema: Node) -> None:
    for name, field in schema.get("properties", {}).items():
        text, bounds = _split(FIELDS.get(name, {}))
        field |= text
        for kind in (field, *field.get("anyOf", ())):
            if kind.get("type") in ("integer", "number"):
                kind |= bounds


def _split(field: Any) -> tuple[Node, Node]:
    text = {key: value for key, value in field.items() if key == "description"}
    return text, {key: value for key, value in field.items() if key != "description"}


def _sampling_params() -> Node:
    """As the struct declares it, which is what the route checks against."""
    _, definitions = msgspec.json.schema_components([SamplingParams], ref_template="#/components/schemas/{name}")
    schema: Node = definitions["SamplingParams"]
    schema["description"] = "Null means the default, of each."
    _describe_fields(schema)
    return schema


def _describe_operation(path: str, operation: Node) -> None:
    responses: Node = operation["responses"]
    responses.pop("422", None)
    responses["200"] = {"description": "Done.", "content": _content(path)}
    error = {"application/json": {"schema": _ref("MessageError" if path in SHAPES else "Error")}}
    for status, text in ERRORS.items():
        responses[status] = {"description": text, "content": error}
    if path in ANSWERS and ANSWERS[path][0] == _ref("AdapterResult"):
        responses["400"]["content"] = {"application/json": {"schema": _ref("AdapterResult")}}
    if scheme := SCHEMES.get(rule_of(path).need):
        operation["security"] = [{scheme: []}, {}]


def _content(path: str) -> Node:
    if path in PLAIN_TEXT:
        return {"text/plain": {"schema": _TEXT}}
    answer, event = ANSWERS.get(path, (_OBJECT, None))
    content: Node = {"application/json": {"schema": answer}}
    if event is not None:
        text = "With stream: `data:` lines, each one JSON object of this kind, or an error; then `data: [DONE]`."
        if event == _ref("NamedEvent"):
            text = "With stream: an `event:` and a `data:` line for each object; the last one says how it ended."
        content["text/event-stream"] = {"schema": {"description": text, "oneOf": [event, _ref("Error")]}}
    return content
