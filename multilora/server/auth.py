"""API keys: ASGI middleware that asks for `Authorization: Bearer <key>`, or `x-api-key: <key>` as Anthropic's do.

With `api_key` set every route asks for it, except the probes and /metrics. With `admin_api_key` set the routes that
change the server ask for that one; otherwise `api_key` is enough for them. With `metrics_key` set /metrics asks for
that one. The admin key opens everything.
Knows paths and keys, nothing of the routes behind them. Installed by `server/app.py`.
"""

import hmac
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from multilora.errors import Unauthorized
from multilora.server.errors import Shape, error_response

OPEN_PATHS = frozenset({"/", "/health", "/health_generate", "/ready", "/ping"})
METRICS_PATHS = frozenset({"/metrics"})
ADMIN_PATHS = frozenset(
    {
        "/load_lora_adapter",
        "/load_lora_adapter_from_tensors",
        "/unload_lora_adapter",
        "/v1/load_lora_adapter",
        "/skyrl/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/update_weight_version",
        "/flush_cache",
        "/abort_request",
        "/abort_requests",
        "/inference/v1/abort_requests",
        "/pause",
        "/resume",
        "/pause_generation",
        "/continue_generation",
        "/sleep",
        "/wake_up",
        "/release_kv_cache_memory",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/reset_prefix_cache",
        "/start_profile",
        "/stop_profile",
    }
)


class KeyCheck:
    """Answers 401 in place of the application when the key is missing or wrong.

    shapes: path → the body of an error there, where it is not OpenAI's.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        admin_api_key: str | None,
        metrics_key: str | None,
        shapes: Mapping[str, Shape],
    ):
        self.app = app
        self.shapes = shapes
        self.user_keys = [key for key in (api_key, admin_api_key) if key] if api_key else []
        self.admin_keys = [key for key in (admin_api_key or api_key,) if key]
        self.metrics_keys = [key for key in (metrics_key, admin_api_key) if key] if metrics_key else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        error = Unauthorized("missing or wrong API key: send Authorization: Bearer <key>")
        shape = self.shapes.get(scope["path"])
        response = error_response(error, shape(error) if shape else None)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        path = scope["path"].rstrip("/") or "/"
        if path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        keys = self._keys_for(path)
        if not keys:
            return True
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        return any(matches)

    def _keys_for(self, path: str) -> list[str]:
        """The keys that open the path; none: it is open."""
        if path in METRICS_PATHS:
            return self.metrics_keys
        return self.admin_keys if path in ADMIN_PATHS else self.user_keys
