"""Errors as Anthropic's clients expect them: `{"type": "error", "error": {"type", "message"}}`."""

from typing import Any

from multilora.errors import MultiloraError
from multilora.server.errors import Shape, shortened

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(error: MultiloraError) -> dict[str, Any]:
    """The JSON body of an error, also used for the `error` event of a stream."""
    kind = _TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": shortened(error.message)}}


SHAPES: dict[str, Shape] = dict.fromkeys(("/v1/messages", "/v1/messages/count_tokens"), anthropic_error)
"""The routes whose errors have this body."""
