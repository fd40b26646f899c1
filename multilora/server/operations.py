"""The routes that generate nothing for a client: health, facts about the server, cache, abort, metrics."""

import asyncio
import dataclasses
import logging
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

import multilora
from multilora.config import Config
from multilora.demo import base_model_path
from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import BadRequest, EngineDead, EngineRestarting, QueueFull
from multilora.front.front import Front
from multilora.front.generation import Job
from multilora.params import SamplingParams
from multilora.server.bodies import AbortBody
from multilora.server.errors import StrictRoute
from multilora.server.loads import internal_state
from multilora.server.metrics.collector import CONTENT_TYPE, Metrics
from multilora.server.pauses import vllm_config
from multilora.server.streaming import Json, while_connected

logger = logging.getLogger(__name__)

GENERATE_SECONDS = 20.0
"""How long /health_generate waits for its token."""

_SECRETS = ("api_key", "admin_api_key", "metrics_key")


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
        """200 once the engine has generated one token; at once while it is paused or asleep, and alive."""
        if driver.front.pauses.paused and not driver.engine.restarting:
            return await health()
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        prompt = [min(1, driver.engine.ready.vocab_size - 1)]

        async def generate() -> None:
            generation = await driver.generate([Job(prompt=prompt, sampling=sampling)])
            await generation.results()

        try:
            await asyncio.wait_for(while_connected(request.receive, generate()), GENERATE_SECONDS)
        except TimeoutError:
            raise QueueFull(f"the engine has generated no token within {GENERATE_SECONDS:g} s") from None
        return Response()


def _facts(routes: APIRouter, front: Front) -> None:
    config, ready = front.config, front.engine.ready

    @routes.get("/")
    async def root() -> Response:
        """What answers here."""
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
                **_names(config),
                "is_generation": True,
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
        """Arguments (without keys), version, adapters, and the engine's latest statistics."""
        arguments = {k: v for k, v in dataclasses.asdict(config).items() if k not in _SECRETS}
        return Json(arguments | _names(config) | {"version": multilora.__version__} | _running(front))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What the base model's `tokenizer_config.json` says, as vLLM."""
        return Json(front.vocabularies.base.reader("/tokenizer_info").info())


def _names(config: Config) -> dict[str, str]:
    """The paths of model and tokenizer, never null, since tools load the tokenizer from there."""
    model = config.model_path or str(base_model_path())
    return {
        "model_path": model,
        "tokenizer_path": config.tokenizer_path or model,
        "served_model_name": config.model_name,
    }


def _running(front: Front) -> dict[str, Any]:
    ready, registry = front.engine.ready, front.registry
    return {
        "dp_size": 1,
        "lora_backend_used": ready.lora_backend,
        "attention_backend_used": ready.attention_backend,
        "device_used": ready.device,
        "num_layers": ready.num_layers,
        "loaded_adapters": [
            {
                "lora_name": ref.name,
                "lora_path": ref.path,
                "version": ref.version,
                "weight_version": ref.weight_version,
                "pinned": ref.pinned,
                "rank": ref.info.rank if ref.info else None,
                "target_modules": ref.info.target_modules if ref.info else None,
                "vocab_size": front.vocabularies.of(((ref.name, 1.0),)).size,
                "active_requests": ref.num_requests,
            }
            | ({"parts": [{"name": name, "weight": weight} for name, weight in ref.parts]} if ref.parts else {})
            for ref in registry.refs()
        ],
        "paused": front.pauses.paused,
        "sleeping": front.pauses.state.sleeping,
        "vllm_config": vllm_config(front),
        "internal_states": [internal_state(front)],
    }


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
