"""The FastAPI application: every route, in both dialects, around one front and the driver of its effects.

Owns nothing but the wiring. `serve.py` runs it under uvicorn.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import multilora
from multilora.adapters.sources.spool import Spool
from multilora.config import Config
from multilora.drivers.async_driver import AsyncDriver, AsyncEngine
from multilora.drivers.request_driver import RequestDriver
from multilora.front.access import Caller
from multilora.front.front import Front
from multilora.front.records import Records
from multilora.front.tokenizer import Tokenizer
from multilora.server import (
    adapters,
    chat,
    completions,
    errors,
    loads,
    native,
    openai,
    openapi,
    operations,
    pauses,
    profiling,
    token_generate,
    tokenization,
    weight_versions,
)
from multilora.server.anthropic import errors as anthropic_errors
from multilora.server.anthropic import routes as anthropic
from multilora.server.auth import AccessCheck
from multilora.server.console import routes as console
from multilora.server.head import HeadAsGet
from multilora.server.key_ring import KeyRing
from multilora.server.metrics.collector import Metrics
from multilora.server.metrics.http import CountRequests, RequestCounter
from multilora.server.pooling import classify, embeddings, score
from multilora.server.request_body import Bodies
from multilora.server.request_ids import RequestIds
from multilora.server.responses import routes as responses
from multilora.server.security_headers import SecurityHeaders
from multilora.server.tracing.exporter import SpanExporter
from multilora.server.tracing.middleware import TraceRequests


def create_app(
    config: Config,
    engine: AsyncEngine,
    tokenizer: Tokenizer | None,
    sampling_defaults: dict[str, Any] | None = None,
    spool: Spool | None = None,
    records: Records | None = None,
    keys: KeyRing | None = None,
    traces: SpanExporter | None = None,
    front_type: type[Front] = Front,
) -> FastAPI:
    """`tokenizer` None: token ids only. `sampling_defaults`: sampling parameters from the model's generation_config,
    for the OpenAI routes. `spool`: the one that the engine was told of, else one of its own. `records`: see `Front`.
    `keys`: else those that the config names. `traces`: where traces of requests go. `front_type`: what the front is.
    The app's `state.driver` is its `AsyncDriver`, `state.keys` its `KeyRing`."""
    metrics = Metrics(config, engine.ready.context_length)
    front = front_type(config, engine, tokenizer, spool or Spool(), metrics, records)
    metrics.watch(front.registry, engine)
    driver = AsyncDriver(engine, front)
    driver.export_span = None if traces is None else traces.export
    defaults = dict(sampling_defaults or {}) if config.sampling_defaults == "model" else {}
    app = FastAPI(title="multilora", version=multilora.__version__)
    app.state.driver = driver
    app.state.metrics = metrics
    app.state.bodies = Bodies(config.max_body_bytes, (config.log_level, config.log_format))
    shapes: dict[str, errors.Shape] = dict.fromkeys(
        adapters.NATIVE_PATHS, lambda e: adapters.native_result(front.registry, e.message)
    )
    errors.install(app, shapes | anthropic_errors.SHAPES)
    include_request_routes(app, driver, defaults)
    app.include_router(responses.router(driver, defaults))
    app.include_router(openai.models_router(front, int(time.time())))
    app.include_router(adapters.router(driver))
    app.include_router(weight_versions.router(driver))
    app.include_router(operations.router(driver, metrics))
    app.include_router(pauses.router(driver))
    app.include_router(loads.router(front, metrics.totals))
    app.include_router(profiling.router(driver))
    app.include_router(console.router(driver, metrics.totals))
    openapi.install(app)
    app.state.keys = keys or KeyRing(config)
    app.state.keys.watch(lambda file: front.use_keys(file.tenants, file.adapters))

    async def admit(caller: Caller) -> None:
        front.quotas.take_request(caller)

    add_middleware(app, config, metrics.http, app.state.keys, admit, traces)
    return app


def include_request_routes(app: FastAPI, driver: RequestDriver, sampling_defaults: dict[str, Any]) -> None:
    """The routes that generate, embed or tokenize, and need nothing else of a server."""
    app.include_router(native.router(driver))
    app.include_router(completions.router(driver, sampling_defaults))
    app.include_router(chat.router(driver, sampling_defaults))
    app.include_router(anthropic.router(driver, sampling_defaults))
    app.include_router(embeddings.router(driver))
    app.include_router(classify.router(driver))
    app.include_router(score.router(driver))
    app.include_router(tokenization.router(driver))
    app.include_router(token_generate.router(driver))


def add_middleware(
    app: FastAPI,
    config: Config,
    counts: RequestCounter,
    keys: KeyRing,
    admit: Callable[[Caller], Awaitable[None]],
    traces: SpanExporter | None,
) -> None:
    """From the innermost to the outermost. admit: see `AccessCheck`; traces: see `create_app`."""
    app.add_middleware(CountRequests, counts=counts)
    if config.api_key or config.admin_api_key or config.metrics_key or config.auth_file:
        app.add_middleware(AccessCheck, keys=keys, admit=admit, shapes=anthropic_errors.SHAPES)
    if config.cors_origins:  # around the keys, so that a page can read the answer to a missing one, too
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(HeadAsGet)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestIds)
    if traces is not None:
        app.add_middleware(TraceRequests, exporter=traces)
