"""Routes whose JSON bodies are read strictly, within bounds, and where they hold up nobody."""

from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from multilora.errors import MultiloraError
from multilora.server import strict_json
from multilora.server.request_body import INLINE_BYTES, Bodies


class StrictRequest(Request):
    """Its JSON is decoded by `strict_json.py`."""

    raw: bytes | None = None  # the body, if it has been read
    decoded: Any = None  # what is in it, if that has been decoded

    async def body(self) -> bytes:
        return await super().body() if self.raw is None else self.raw

    async def json(self) -> Any:
        return strict_json.decode(await self.body()) if self.decoded is None else self.decoded


class StrictRoute(APIRoute):
    """A route whose body is read by `StrictRequest`, within the bounds of `request_body.py`."""

    max_body_bytes: ClassVar[int | None] = None
    """Where a route has its own limit."""
    advice: ClassVar[str] = " (--max-body-bytes)"
    """What to do about a longer body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            own = StrictRequest(request.scope, request.receive, request._send)  # noqa: SLF001 - starlette has no other name for it
            if self.body_field is not None:
                bodies: Bodies = request.app.state.bodies
                own.raw = await bodies.read(own, self.max_body_bytes, self.advice)  # here its errors keep their types
                if len(own.raw) > INLINE_BYTES and "json" in own.headers.get("content-type", ""):
                    kind = self.body_field.field_info.annotation
                    own.decoded = await bodies.decode(
                        own.raw, kind, self.max_body_bytes
                    )  # FastAPI leaves that as it is
                    own.raw = b"{}"  # not kept while the request runs
            try:
                return await handler(own)
            except HTTPException as e:
                if isinstance(e.__cause__, MultiloraError):  # of reading the body, which FastAPI has wrapped
                    raise e.__cause__ from None
                raise

        return strict
