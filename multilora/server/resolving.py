"""What a route does before it reads a body: have the resolver load the adapters that the body names."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Receive

from multilora.drivers.request_driver import RequestDriver
from multilora.server.streaming import while_connected


@contextlib.asynccontextmanager
async def resolved(
    receive: Receive, driver: RequestDriver, model: str | None, lora_path: Any = None
) -> AsyncIterator[None]:
    """Around the reading and sending of one request with these fields: what the resolver has loaded for it stays.

    Raises the error of an adapter that cannot be loaded. A client that hangs up ends its waiting, not the load.
    """
    front = driver.front
    if not front.resolver.active:
        yield
        return
    holding = driver.hold(front.registry.names_of(model, lora_path))
    held = await while_connected(receive, holding, front.resolver.release)
    try:
        yield
    finally:
        front.resolver.release(held)
