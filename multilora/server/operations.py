"""The routes that generate nothing for a client: health, facts about the server, cache, abort, metrics."""

import asyncio
import logging

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

import multilora
from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import BadRequest, EngineDead, EngineRestarting, QueueFull
from multilora.front.embedding import embedding_job
from multilora.front.front import Front
from multilora.front.generation import Job
from multilora.params import SamplingParams
from multilora.server.bodies import AbortBody
from multilora.server.console.routes import page_response
from multilora.server.metrics.collector import CONTENT_TYPE, Metrics
from multilora.server.server_info import model_names, server_facts
from multilora.server.streaming import Json, while_connected
from multilora.server.strict_route import StrictRoute

logger = logging.getLogger(__name__)

GENERATE_SECONDS = 20.0
"""How long /health_generate waits for its token."""


def router(driver: AsyncDriver, metrics: Metrics) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)
    _health(routes, driver)
    _facts(routes, driver.front)
    _control(routes, driver, metrics)
    return routes


def _health(routes: APIRouter, driver: AsyncDriver) -> None:
    @routes.get("/health")
    @routes.get("/ping")
    @routes.post("/ping")
    async def health() -> Response:
        """200 while there is an engine or another one is coming, else 503: the server must be restarted."""
        if not driver.engine.alive:
            raise EngineDead("the engine process ended; restart the server")
        return Response()

    @routes.get("/ready")
    async def ready() -> Response:
        """200 while requests are taken, 503 also while the engine is being started again."""
        if driver.engine.restarting:
            raise EngineRestarting("the engine is being started again; try again later")
        return await health()

    @routes.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        """200 once the engine has generated a token, or read one where it generates none; at once while it is paused
        or asleep, and alive."""
        if driver.front.pauses.paused and not driver.engine.restarting:
            return await health()
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        ready = driver.engine.ready
        job = Job(prompt=[min(1, ready.vocab_size - 1)], sampling=sampling)
        if not ready.generates:
            job = embedding_job(job.prompt, ready.embedding, None)

        async def generate() -> None:
            generation = await driver.generate([job])
            await generation.results()

        try:
            await asyncio.wait_for(while_connected(request.receive, generate()), GENERATE_SECONDS)
        except TimeoutError:
            raise QueueFull(f"the engine has generated no token within {GENERATE_SECONDS:g} s") from None
        return Response()


def _facts(routes: APIRouter, front: Front) -> None:
    config, ready = front.config, front.engine.ready

    @routes.get("/")
    async def root(request: Request) -> Response:
        """What answers here; to a browser, which asks for HTML, the console."""
        if "text/html" in request.headers.get("accept", ""):
            return page_response()
        return Json({"name": "multilora", "version": multilora.__version__})

    @routes.get("/version")
    async def version() -> Response:
        """As vLLM."""
        return Json({"version": multilora.__version__})

    @routes.get("/model_info")
    @routes.get("/get_model_info")
    async def model_info() -> Response:
        """The base model."""
        return Json(
            {
                **model_names(config),
                "is_generation": ready.generates,
                "preferred_sampling_params": None,
                "weight_version": front.registry.weight_version,
                "context_length": ready.context_length,
                "vocab_size": ready.vocab_size,
                "eos_token_ids": ready.eos_token_ids,
                "dtype": ready.dtype,
            }
        )

    @routes.get("/server_info")
    @routes.get("/get_server_info")
    async def server_info() -> Response:
        """Arguments (without keys), version, adapters, and the engine's latest statistics. A tenant's key sees its
        adapters, and no arguments."""
        return Json(server_facts(front))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What the base model's `tokenizer_config.json` says, as vLLM."""
        return Json(front.vocabularies.base.reader("/tokenizer_info").info())


def _control(routes: APIRouter, driver: AsyncDriver, counted: Metrics) -> None:
    @routes.get("/flush_cache")
    @routes.post("/flush_cache")
    async def flush_cache() -> Response:
        """Drop every idle prefix from the cache."""
        await driver.engine.flush_cache()
        logger.info("prefix cache flushed")
        return PlainTextResponse("Cache flushed.\n")

    @routes.post("/abort_request")
    async def abort_request(body: AbortBody) -> Response:
        """Abort one request by its rid, or all."""
        if not body.rid and not body.abort_all:
            raise BadRequest("rid or abort_all must be given", param="rid")
        driver.front.abort(None if body.abort_all else body.rid, body.abort_message or "aborted by /abort_request")
        return Response()

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(counted.render(), media_type=CONTENT_TYPE)
