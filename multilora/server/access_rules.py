"""Which key opens which route: one table with a line for each. Knows neither keys nor what the routes do.

`docs/security.md` shows the table; tests hold it against the routes of the application and against that page.
Called by `auth.py` and `openapi.py`.
"""

import enum
from dataclasses import dataclass

from starlette.routing import compile_path


class Need(enum.Enum):
    """What a route asks for. Where there is no --auth-file, any key that is no admin's is the key of --api-key."""

    NOTHING = "no key"
    SCRAPE = "what --metrics-key says; with --auth-file any key, which sees its tenant's part"
    KEY = "any key"
    LOADS = "with --auth-file a key that may load adapters, for those of its tenant; else the admin's"
    ABORTS = "with --auth-file any key, for requests of its tenant; else the admin's"
    OBSERVES = "with --auth-file the admin's; else any key"
    ADMIN = "the admin's key"


@dataclass(frozen=True)
class Rule:
    """need: of the route. post_only: GET, which changes something there, is refused while there are keys."""

    need: Need
    post_only: bool = False


_LINES: dict[Need, tuple[str, ...]] = {
    Need.NOTHING: (
        "/",
        "/health",
        "/health_generate",
        "/ready",
        "/ping",
        "/console",
        "/console/console.css",
        "/console/console.js",
        "/console/charts.js",
    ),
    Need.SCRAPE: ("/metrics",),
    Need.KEY: (
        "/generate",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/input_items",
        "/v1/responses/{response_id}/cancel",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/inference/v1/generate",
        "/v1/embeddings",
        "/encode",
        "/classify",
        "/v1/classify",
        "/v1/score",
        "/score",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/tokenize",
        "/v1/tokenize",
        "/detokenize",
        "/v1/detokenize",
        "/tokenizer_info",
        "/v1/models",
        "/v1/models/{name:path}",
        "/model_info",
        "/get_model_info",
        "/server_info",
        "/get_server_info",
        "/console/state",
        "/weight_info",
        "/version",
        "/get_world_size",
        "/is_paused",
        "/is_sleeping",
        "/openapi.json",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
    ),
    Need.LOADS: (
        "/load_lora_adapter",
        "/load_lora_adapter_from_tensors",
        "/unload_lora_adapter",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/skyrl/v1/load_lora_adapter",
    ),
    Need.ABORTS: ("/abort_request", "/abort_requests", "/inference/v1/abort_requests"),
    Need.OBSERVES: ("/v1/loads", "/get_load", "/load"),
    Need.ADMIN: (
        "/update_weight_version",
        "/flush_cache",
        "/reset_prefix_cache",
        "/pause",
        "/resume",
        "/pause_generation",
        "/continue_generation",
        "/sleep",
        "/wake_up",
        "/release_kv_cache_memory",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/start_profile",
        "/stop_profile",
        "/console/log",
    ),
}
_POST_ONLY = frozenset({"/flush_cache"})

RULES: dict[str, Rule] = {path: Rule(need, path in _POST_ONLY) for need, paths in _LINES.items() for path in paths}
"""The rule of each route, by its path as the route is declared."""

UNKNOWN = Rule(Need.KEY)
"""The rule of a path that no route has: without a key not even that is told."""

_PATTERNS = [(compile_path(path)[0], rule) for path, rule in RULES.items() if "{" in path]


def rule_of(path: str) -> Rule:
    """The rule of the route that a request's path leads to."""
    path = path.rstrip("/") or "/"
    if path in RULES:
        return RULES[path]
    return next((rule for pattern, rule in _PATTERNS if pattern.match(path)), UNKNOWN)
