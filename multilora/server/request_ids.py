"""Request ids: ASGI middleware that gives each HTTP request one, for its log lines and for the client.

A client that sends `x-request-id` gets it back; what is no plain id (too long, not printable) is replaced.
"""

import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multilora.logs import REQUEST_ID

HEADER = b"x-request-id"
MAX_LENGTH = 128


class RequestIds:
    """Sets `logs.REQUEST_ID` for what runs in the request's task, and the header of its answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _given(scope) or uuid.uuid4().hex

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id.encode())]}
            await send(message)

        token = REQUEST_ID.set(request_id)
        try:
            await self.app(scope, receive, with_id)
        finally:
            REQUEST_ID.reset(token)


def _given(scope: Scope) -> str | None:
    """The client's, if it is a plain one."""
    for name, value in scope["headers"]:
        if name == HEADER:
            text: str = value.decode("latin-1")
            return text if len(text) <= MAX_LENGTH and text.isascii() and text.isprintable() and text else None
    return None
