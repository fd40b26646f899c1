"""What `/server_info` and `/model_info` say of this server: arguments, model, adapters and the engine's state.

A tenant's key sees no arguments, no directories of the operator and nothing of what other tenants do. Called by
`operations.py`.
"""

import dataclasses
from typing import Any

import multilora
from multilora.config import Config
from multilora.demo import base_model_path
from multilora.front.access import CALLER
from multilora.front.adapter_view import SeenAdapter, seen_adapters
from multilora.front.front import Front
from multilora.server.loads import internal_state
from multilora.server.pauses import vllm_config

SECRETS = ("api_key", "admin_api_key", "metrics_key", "ssl_keyfile_password")
"""The arguments that nobody is shown."""
STATE_FOR_TENANTS = ("effective_max_running_requests_per_dp", "dp_size", "tp_size")


def server_facts(front: Front) -> dict[str, Any]:
    """All that the present caller may know."""
    config, tenant = front.config, CALLER.get().tenant.name
    arguments = {k: v for k, v in dataclasses.asdict(config).items() if k not in SECRETS}
    state = internal_state(front)
    if tenant:
        arguments, state = {}, {name: state[name] for name in STATE_FOR_TENANTS}
    return (
        arguments
        | model_names(config)
        | {"version": multilora.__version__}
        | _engine_facts(front)
        | {
            "loaded_adapters": [_adapter(front, adapter) for adapter in seen_adapters(front.registry)],
            "paused": front.pauses.paused,
            "sleeping": front.pauses.state.sleeping,
            "vllm_config": vllm_config(front),
            "internal_states": [state],
        }
    )


def model_names(config: Config) -> dict[str, str]:
    """The paths of model and tokenizer, never null, since tools load the tokenizer from there."""
    model = config.model_path or str(base_model_path())
    return {
        "model_path": model,
        "tokenizer_path": config.tokenizer_path or model,
        "served_model_name": config.model_name,
    }


def _engine_facts(front: Front) -> dict[str, Any]:
    ready = front.engine.ready
    return {
        "dp_size": 1,
        "lora_backend_used": ready.lora_backend,
        "attention_backend_used": ready.attention_backend,
        "device_used": ready.device,
        "num_layers": ready.num_layers,
    }


def _adapter(front: Front, adapter: SeenAdapter) -> dict[str, Any]:
    ref, caller = adapter.ref, CALLER.get()
    facts: dict[str, Any] = {
        "lora_name": adapter.name,
        "lora_path": adapter.path,
        "version": ref.version,
        "weight_version": ref.weight_version,
        "pinned": ref.pinned,
        "rank": ref.info.rank if ref.info else None,
        "target_modules": ref.info.target_modules if ref.info else None,
        "vocab_size": front.vocabularies.of(((ref.name, 1.0),)).size,
    }
    mine = caller.admin or caller.owns(ref.name)
    if mine:
        facts["active_requests"] = ref.num_requests
    if mine and ref.parts:
        facts["parts"] = [{"name": caller.shown(name), "weight": weight} for name, weight in ref.parts]
    return facts
