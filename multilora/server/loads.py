"""How busy the server is, in the words of those who balance load: SGLang's `/v1/loads` and `/get_load`, vLLM's
`/load`, and the state that SGLang's tools read in `/server_info`.

All of it comes from the engine's latest `Stats`, which is at most a second old.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Response

import multilora
from multilora.errors import BadRequest
from multilora.front.front import Front
from multilora.server.metrics.collector import CONTENT_TYPE
from multilora.server.metrics.totals import Totals
from multilora.server.streaming import Json
from multilora.server.strict_route import StrictRoute

Section = dict[str, Any]


def router(front: Front, totals: Totals) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.get("/v1/loads")
    async def loads(dp_rank: int | None = None, include: str | None = None, format: str | None = None) -> Response:
        """Requests, tokens and memory in use, as SGLang. `include`: names of sections, separated by commas;
        `format`: json or prometheus."""
        wanted = _sections(include)
        if format not in (None, "json", "prometheus"):
            raise BadRequest(f"format: {format!r}: expected json or prometheus", param="format")
        load = core_load(front, totals)
        for query, (name, section) in SECTIONS.items():
            if query in wanted or "all" in wanted:
                load[name] = section(front)
        found = [load] if dp_rank in (None, 0) else []
        if format == "prometheus":
            return Response(_prometheus(found), media_type=CONTENT_TYPE)
        about = {"version": multilora.__version__, "accelerator": front.engine.ready.device}
        devices = {"num_accelerators": front.config.tp_size}
        return Json({"timestamp": datetime.now(UTC).isoformat()} | about | devices | {"loads": found})

    @routes.get("/get_load")
    async def get_load() -> Response:
        """As SGLang before `/v1/loads`."""
        stats = front.engine.stats
        tokens = used_tokens(front) + front.waiting_tokens()
        both = {"num_reqs": stats.running + stats.waiting, "num_waiting_reqs": stats.waiting, "num_tokens": tokens}
        return Json([{"dp_rank": 0} | both])

    @routes.get("/load")
    async def load() -> Response:
        """How many sequences are running or waiting, as vLLM."""
        return Json({"server_load": front.in_flight})

    return routes


def used_tokens(front: Front) -> int:
    """Tokens that the running requests' pages hold room for."""
    stats = front.engine.stats
    return stats.kv_pages * front.config.page_size // stats.block_pages


def core_load(front: Front, totals: Totals) -> Section:
    """SGLang's fields. Those that this server does not measure are left out."""
    stats, config = front.engine.stats, front.config
    used, waiting = used_tokens(front), front.waiting_tokens()
    return {
        "timestamp": datetime.now(UTC).timestamp(),
        "dp_rank": 0,
        "num_running_reqs": stats.running,
        "num_waiting_reqs": stats.waiting,
        "num_waiting_uncached_tokens": waiting,
        "num_used_tokens": used,
        "num_total_tokens": used + waiting,
        "num_active_tokens": used + waiting,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": stats.total_pages * config.page_size // stats.block_pages,
        "max_running_requests": config.max_running_requests,
        "token_usage": stats.usage,
        "gen_throughput": stats.gen_throughput if stats.running else 0.0,
        "cache_hit_rate": stats.cache_hit_rate,
        "utilization": stats.running / config.max_running_requests,
        "total_prefill_uncached_tokens": totals.prompt_tokens - totals.cached_tokens,
    }


def internal_state(front: Front) -> Section:
    """`/server_info`'s `internal_states[0]`: what SGLang's benchmarks and its router read, and all of `Stats`."""
    stats, config = front.engine.stats, front.config
    return {
        "effective_max_running_requests_per_dp": config.max_running_requests,
        "last_gen_throughput": stats.gen_throughput,
        "memory_usage": _memory(front),
        "dp_size": 1,
        "tp_size": config.tp_size,
    } | {name: getattr(stats, name) for name in stats.__struct_fields__}


def _memory(front: Front) -> Section:
    stats = front.engine.stats
    gigabytes = stats.total_pages * stats.page_bytes / (1 << 30)
    tokens = stats.total_pages * front.config.page_size // stats.block_pages
    return {"kv_cache_gb": gigabytes, "token_capacity": tokens}


def _lora(front: Front) -> Section:
    used, total = front.engine.stats.slots_used, front.engine.stats.slots_total
    return {"slots_used": used, "slots_total": total, "utilization": used / total if total else 0.0}


def _queues(front: Front) -> Section:
    return {"waiting": front.engine.stats.waiting, "grammar": 0, "paused": 0, "retracted": 0, "prealloc_ready": 0}


SECTIONS: dict[str, tuple[str, Callable[[Front], Section]]] = {
    "memory": ("memory", _memory),
    "lora": ("lora", _lora),
    "queues": ("queues", _queues),
}
"""The sections of the answer by SGLang's word in `include`: its name there, and what is in it."""

_KNOWN = frozenset({"core", "all", "spec", "disagg", *SECTIONS})  # there is never anything in spec and disagg


def _sections(include: str | None) -> set[str]:
    wanted = {part.strip() for part in include.split(",")} if include else {"all"}
    if wanted - _KNOWN:
        bad = sorted(wanted - _KNOWN)[0]
        raise BadRequest(f"include: {bad[:100]!r}: expected {', '.join(sorted(_KNOWN))}", param="include")
    return wanted


def _prometheus(loads: list[Section]) -> str:
    lines = []
    for load in loads:
        flat = {key: value for key, value in load.items() if isinstance(value, int | float) and key != "dp_rank"}
        for section, values in load.items():
            if isinstance(values, dict):
                flat |= {f"{section}_{key}": value for key, value in values.items()}
        for key, value in flat.items():
            lines += [f"# TYPE sglang_{key} gauge", f'sglang_{key}{{dp_rank="{load["dp_rank"]}"}} {value}']
    return "\n".join(lines) + "\n"
