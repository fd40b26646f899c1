"""The FastAPI application: every route, in both dialects, around one front and the driver of its effects.

Owns nothing but the wiring. `serve.py` runs it under uvicorn.
"""

import time
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import multilora
from multilora.adapters.sources.spool import Spool
from multilora.config import Config
from multilora.drivers.async_driver import AsyncDriver, AsyncEngine
from multilora.front.front import Front
from multilora.front.tokenizer import Tokenizer
from multilora.server import adapters, chat, completions, errors, native, openai, operations, tokenization
from multilora.server.auth import KeyCheck
from multilora.server.metrics import Metrics
from multilora.server.request_body import Bodies


def create_app(
    config: Config,
    engine: AsyncEngine,
    tokenizer: Tokenizer | None,
    sampling_defaults: dict[str, Any] | None = None,
    spool: Spool | None = None,
) -> FastAPI:
    """`tokenizer` None: token ids only. `sampling_defaults`: sampling parameters from the model's generation_config,
    for the OpenAI routes. `spool`: the one that the engine was told of, else one of its own. The app's
    `state.driver` is its `AsyncDriver`."""
    metrics = Metrics(config.model_name, config.max_loras_per_batch)
    front = Front(config, engine, tokenizer, spool or Spool(), metrics)
    metrics.watch(front.registry, lambda: engine.stats)
    driver = AsyncDriver(engine, front)
    defaults = dict(sampling_defaults or {}) if config.sampling_defaults == "model" else {}
    app = FastAPI(title="multilora", version=multilora.__version__)
    app.state.driver = driver
    app.state.bodies = Bodies(config.max_body_bytes)
    errors.install(
        app, dict.fromkeys(adapters.NATIVE_PATHS, lambda e: adapters.native_result(front.registry, e.message))
    )
    app.include_router(native.router(driver))
    app.include_router(completions.router(driver, defaults))
    app.include_router(chat.router(driver, defaults))
    app.include_router(tokenization.router(driver))
    app.include_router(openai.models_router(front, int(time.time())))
    app.include_router(adapters.router(driver))
    app.include_router(operations.router(driver, metrics))
    if config.api_key or config.admin_api_key:
        app.add_middleware(KeyCheck, api_key=config.api_key, admin_api_key=config.admin_api_key)
    if config.cors_origins:  # outermost, so that a page can read the answer to a missing key, too
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app
