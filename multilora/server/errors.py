"""Errors as HTTP responses: one error body for every route.

Body: `{"error": {"message", "type", "param", "code"}}`, which is OpenAI's and contains SGLang's native one: `type` is
OpenAI's word for the status, `code` the name of the typed error. SGLang's two adapter routes answer a failure in
the shape of their success; `install` is told so. Called by `server/app.py`; the routes only raise.
"""

import logging
import reprlib
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from multilora.errors import (
    AdapterUnavailable,
    BadRequest,
    EnginePaused,
    EngineRestarting,
    MultiloraError,
    QueueFull,
    RateLimited,
    ServerStopping,
)

logger = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
    507: "server_error",
}
_CODES = {
    "UnknownModel": "model_not_found",
    "Unauthorized": "invalid_api_key",
    "RateLimited": "rate_limit_exceeded",
    "PromptTooLong": "context_length_exceeded",
    "PreviousResponseNotFound": "previous_response_not_found",
}

MAX_MESSAGE = 2000
"""Characters of an error's message: it may quote what the client sent."""

Shape = Callable[[MultiloraError], dict[str, Any]]


def shortened(message: str) -> str:
    """An error's message as a client gets it back."""
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"


def error_body(error: MultiloraError, status: int | None = None) -> dict[str, Any]:
    """The JSON body of an error, also used for an error frame inside a stream."""
    return {
        "error": {
            "message": shortened(error.message),
            "type": _TYPES.get(status or error.status, "server_error"),
            "param": error.param,
            "code": _CODES.get(error.kind, error.kind),
        }
    }


def error_response(
    error: MultiloraError, body: dict[str, Any] | None = None, status: int | None = None
) -> JSONResponse:
    """`body` and `status`: where a route has its own."""
    status = status or error.status
    headers = {}
    if isinstance(
        error, QueueFull | EnginePaused | AdapterUnavailable | EngineRestarting | ServerStopping | RateLimited
    ):
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(body or error_body(error, status), status, headers)


def from_validation(error: RequestValidationError) -> BadRequest:
    """The first thing wrong with a body, naming the field."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "missing" and not where:
        return BadRequest("the body is missing: expected a JSON object")
    if first["type"] == "model_attributes_type" and not where:
        return BadRequest("the body must be a JSON object, sent as application/json")
    named = [part for part in where if not part.startswith(("function-", "list[", "dict["))]
    if len(named) > 1 and named[-1] in ("str", "int", "float", "bool"):  # which of several types was tried
        named.pop()
    name = ".".join(named)
    field = named[1] if named[0] == "sampling_params" and len(named) > 1 else named[0]
    if first["type"] == "missing":
        return BadRequest(f"{name}: this field is required", param=field)
    if first["type"] == "value_error":
        return BadRequest(f"{name}: {first['ctx']['error']}", param=field)
    return BadRequest(f"{name}: {_brief(first['input'])}: {first['msg']}", param=field)


def _brief(value: Any) -> str:
    """The beginning of its repr; cheap for large values, too."""
    if isinstance(value, str | bytes):
        value = value[:100]
    text = repr(value) if isinstance(value, str | bytes | int | float) else _SHORT.repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring = 4, 30, 10, 100


def install(app: FastAPI, shapes: dict[str, Shape]) -> None:
    """Register the handlers. `shapes`: path → the body of an error there, where it is not `error_body`."""

    def respond(request: Request, error: MultiloraError) -> Response:
        shape = shapes.get(request.url.path)
        return error_response(error, shape(error) if shape else None)

    async def typed(request: Request, error: Exception) -> Response:
        assert isinstance(error, MultiloraError)
        return respond(request, error)

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return respond(request, from_validation(error))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        body: dict[str, Any] = {"message": str(error.detail), "type": _TYPES.get(error.status_code, "server_error")}
        body |= {"param": None, "code": error.status_code}
        if error.status_code == 404:
            body["message"] = f"no route {request.method} {request.url.path}"
        return JSONResponse({"error": body}, error.status_code, error.headers)

    async def gone(request: Request, error: Exception) -> Response:  # noqa: ARG001 - part of the contract
        return Response(status_code=499)  # the connection is closed: the answer is never read

    async def unexpected(request: Request, error: Exception) -> Response:
        return respond(request, MultiloraError(f"internal error: {type(error).__name__}"))

    app.add_exception_handler(MultiloraError, typed)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, unexpected)
