"""Headers that tell browsers and caches to do nothing with an answer but to show it, as ASGI middleware.

Installed by `server/app.py`.
"""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
PAGES = frozenset({"/docs", "/docs/oauth2-redirect", "/redoc"})
"""Pages with scripts of others, which the last header would keep from working."""
TLS_ONLY = {"Strict-Transport-Security": "max-age=31536000"}


class SecurityHeaders:
    """Sets the headers that the application has not set itself, as the console has."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        wanted = HEADERS | (TLS_ONLY if scope.get("scheme") == "https" else {})

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in wanted.items():
                    if name != "Content-Security-Policy" or scope["path"] not in PAGES:
                        headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, with_headers)
