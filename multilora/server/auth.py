"""API keys: ASGI middleware that asks for `Authorization: Bearer <key>`, or `x-api-key: <key>` as Anthropic's do.

Here, and nowhere else, a request's key becomes its `Caller`, and the caller is held against the rule of the route
(`access_rules.py`). What a caller may do with which adapter is decided where adapters are named, by `CALLER`.
Knows nothing of the routes behind the paths. Installed by `server/app.py`.
"""

from collections.abc import Awaitable, Callable, Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from multilora.errors import Forbidden, MethodNotAllowed, MultiloraError, Unauthorized
from multilora.front.access import CALLER, NOBODY, OPERATOR, Caller
from multilora.server.access_rules import Need, Rule, rule_of
from multilora.server.errors import Shape, error_response
from multilora.server.key_ring import KeyRing


class AccessCheck:
    """Answers 401, 403, 405 or 429 in place of the application where a caller may not go on.

    admit: awaited for each caller that may; raises the error of one who has used up its requests. shapes: path → the
    body of an error there, where it is not OpenAI's.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyRing, admit: Callable[[Caller], Awaitable[None]], shapes: Mapping[str, Shape]
    ) -> None:
        self.app = app
        self._keys = keys
        self._admit = admit
        self._shapes = shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            caller, counted = self._check(scope)
            if counted:
                await self._admit(caller)
        except MultiloraError as e:
            await self._refuse(e, scope, receive, send)
            return
        token = CALLER.set(caller)
        try:
            await self.app(scope, receive, send)
        finally:
            CALLER.reset(token)

    def _check(self, scope: Scope) -> tuple[Caller, bool]:
        """Who calls, and whether that counts as a request of theirs. Raises the error that keeps it from going on."""
        rule = rule_of(scope["path"])
        if rule.need is Need.NOTHING or scope["method"] == "OPTIONS":
            return NOBODY, False
        key = _key(scope)
        if rule.need is Need.SCRAPE:
            return self._scraper(key), False
        caller = self._keys.caller(key) or self._keys.nobody
        if caller is None:
            raise _unauthorized()
        self._check_rule(rule, caller, scope["method"])
        return caller, True

    def _scraper(self, key: str) -> Caller:
        if self._keys.scrape_is_open or self._keys.may_scrape_all(key):
            return OPERATOR
        caller = self._keys.caller(key) if self._keys.tenants else None
        if caller is None:
            raise _unauthorized()
        return caller

    def _check_rule(self, rule: Rule, caller: Caller, method: str) -> None:
        match rule.need:
            case Need.LOADS if self._keys.tenants:
                enough = bool(caller.load)
            case Need.ABORTS if self._keys.tenants:
                enough = True
            case Need.ADMIN | Need.LOADS | Need.ABORTS:
                enough = caller.admin
            case Need.OBSERVES:
                enough = caller.admin or not self._keys.tenants
            case _:
                enough = True
        if not enough and not self._keys.tenants:
            raise _unauthorized()
        if not enough:
            raise Forbidden(f"key {caller.key_id!r} may not do this")
        if rule.post_only and method == "GET":
            raise MethodNotAllowed("GET changes nothing here: send POST")

    async def _refuse(self, error: MultiloraError, scope: Scope, receive: Receive, send: Send) -> None:
        shape = self._shapes.get(scope["path"])
        response = error_response(error, shape(error) if shape else None)
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, MethodNotAllowed):
            response.headers["Allow"] = "POST"
        await response(scope, receive, send)


def _key(scope: Scope) -> str:
    headers = Headers(scope=scope)
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _unauthorized() -> Unauthorized:
    return Unauthorized("missing or wrong API key: send Authorization: Bearer <key>")
