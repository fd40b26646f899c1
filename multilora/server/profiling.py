"""`/start_profile` and `/stop_profile`: torch's profiler in the engine's process, with the bodies of SGLang and vLLM.

The server chooses where a trace is written: below --profile-dir or, without it, below a directory that goes with the
server. A client may name a directory inside, never one outside.
"""

import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from pydantic import BeforeValidator, Field

from multilora.drivers.async_driver import AsyncDriver
from multilora.engine.messages import StartProfile
from multilora.errors import BadRequest
from multilora.server.bodies import Body, Integer
from multilora.server.strict_route import StrictRoute

_PART_OF_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


def _from_text(value: Any) -> Any:
    """SGLang's benchmark sends numbers of steps as text."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20 else value


Steps = Annotated[Integer, BeforeValidator(_from_text), Field(ge=1, lt=2**62)]


class ProfileBody(Body):
    """`POST /start_profile`, as SGLang; the last two fields are vLLM's."""

    where = "/start_profile"
    output_dir: str | None = None
    start_step: Steps | None = None
    num_steps: Steps | None = None
    activities: list[Literal["CPU", "GPU"]] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    profile_id: str | None = None
    profile_prefix: str | None = None
    delay_iterations: Annotated[Integer, Field(ge=0, lt=2**62)] | None = None
    max_iterations: Annotated[Integer, Field(ge=0, lt=2**62)] | None = None


def router(driver: AsyncDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)
    latest = ""

    @routes.get("/start_profile")
    @routes.post("/start_profile")
    async def start_profile(body: ProfileBody | None = None) -> Response:
        """Record what the engine's process does, until /stop_profile or for a number of steps."""
        nonlocal latest
        wanted = read_profile(body or ProfileBody(), driver.engine.profile_root, driver.engine.stats.steps)
        await driver.engine.start_profile(wanted)
        latest = wanted.path
        return PlainTextResponse("Start profiling.\n")

    @routes.get("/stop_profile")
    @routes.post("/stop_profile")
    async def stop_profile() -> Response:
        """Write what was recorded; answers when it is written."""
        await driver.engine.stop_profile()
        return PlainTextResponse(f"Stop profiling. Written to {latest}\n")

    return routes


def read_profile(body: ProfileBody, root: Path, steps: int) -> StartProfile:
    """`steps`: how many the engine has run. Raises BadRequest naming the field."""
    start, number = body.start_step, body.num_steps
    if body.delay_iterations:
        start = steps + 1 + body.delay_iterations
    if body.max_iterations:
        number = body.max_iterations
    identity = body.profile_id or str(time.time())
    for name, part in (("profile_id", identity), ("profile_prefix", body.profile_prefix)):
        if part is not None and not _PART_OF_NAME.fullmatch(part):
            raise BadRequest(f"{name}: {part[:100]!r}: expected 1 to 100 letters, digits and ._-", param=name)
    prefix = f"{body.profile_prefix}-" if body.profile_prefix else ""
    return StartProfile(
        path=str(_inside(root, body.output_dir or ".") / f"{prefix}{identity}-TP-0.trace.json.gz"),
        start_step=start,
        num_steps=number,
        activities=list(body.activities or ("CPU", "GPU")),
        with_stack=body.with_stack is not False,
        record_shapes=bool(body.record_shapes),
    )


def _inside(root: Path, directory: str) -> Path:
    try:
        path = (root / directory).resolve()
        inside = path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a loop of links
        inside = False
    if not inside:
        message = "must lie below the server's --profile-dir, or be a relative path; left out, the server chooses"
        raise BadRequest(f"output_dir: {directory[:200]!r} {message}", param="output_dir")
    return path
