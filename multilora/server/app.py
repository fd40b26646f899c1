"""The FastAPI application: every route, in both dialects, around one engine client.

Owns nothing but the wiring. `serve.py` runs it under uvicorn; tests give it a `testing.FakeEngineClient`.
"""

import time
from typing import Any

from fastapi import FastAPI

import multilora
from multilora.adapters.sources.spool import Spool
from multilora.config import Config
from multilora.front.registry import AdapterRegistry
from multilora.front.tokenizer import Tokenizer
from multilora.front.vocabulary import Vocabularies
from multilora.server import adapters, chat, completions, errors, native, openai, operations
from multilora.server.auth import KeyCheck
from multilora.server.client import Client
from multilora.server.generation import Front
from multilora.server.metrics import Metrics


def create_app(
    config: Config,
    client: Client,
    tokenizer: Tokenizer | None,
    registry: AdapterRegistry,
    sampling_defaults: dict[str, Any] | None = None,
    spool: Spool | None = None,
) -> FastAPI:
    """`tokenizer` None: token ids only. `sampling_defaults`: sampling parameters from the model's generation_config,
    for the OpenAI routes. `spool`: the one that the engine was told of, else one of its own. The app's
    `state.adapters` is its `AdapterManager`."""
    metrics = Metrics(registry, lambda: client.stats, config.max_loras_per_batch)
    vocabularies = Vocabularies(tokenizer, client.ready, registry, config.lora_root)
    front = Front(config, client, vocabularies, registry, metrics, sampling_defaults)
    manager = adapters.AdapterManager(client, registry, metrics, spool or Spool(), vocabularies)
    app = FastAPI(title="multilora", version=multilora.__version__)
    app.state.adapters = manager
    errors.install(app, dict.fromkeys(adapters.NATIVE_PATHS, lambda e: adapters.native_result(registry, e.message)))
    app.include_router(native.router(front))
    app.include_router(completions.router(front))
    app.include_router(chat.router(front))
    app.include_router(openai.models_router(front, int(time.time())))
    app.include_router(adapters.router(manager))
    app.include_router(operations.router(front))
    if config.api_key or config.admin_api_key:
        app.add_middleware(KeyCheck, api_key=config.api_key, admin_api_key=config.admin_api_key)
    return app
