"""What the console draws: the model, the arena, every adapter and where it is, load and latencies, queues by tenant.

All of it is the engine's latest `Stats`, at most a second old, and the front's own counts. A tenant's key sees its
adapters and requests; the arena, totals and other tenants are the operator's affair. Called by `routes.py`.
"""

import time
from collections import Counter
from typing import Any

import multilora
from multilora.drivers.async_driver import AsyncDriver
from multilora.engine.messages import AdapterStats
from multilora.front.access import CALLER, Caller
from multilora.front.adapter_view import SeenAdapter, seen_adapters
from multilora.front.front import Front
from multilora.server.metrics.totals import Totals

Facts = dict[str, Any]


def console_state(driver: AsyncDriver, totals: Totals) -> Facts:
    """Everything that the present caller may see."""
    front, caller = driver.front, CALLER.get()
    everything = not caller.tenant.name
    return {
        "time": time.time(),
        "version": multilora.__version__,
        "engine": _engine_state(driver),
        "model": _model(front),
        "caller": _caller(front, caller),
        "arena": _arena(front) if everything else None,
        "counters": _counters(front, totals) if everything else None,
        "queues": _queues(front, caller),
        "adapters": _adapters(front, caller),
    }


def _engine_state(driver: AsyncDriver) -> str:
    """dead, restarting, sleeping, paused or running."""
    if not driver.engine.alive:
        return "dead"
    if driver.engine.restarting:
        return "restarting"
    pauses = driver.front.pauses
    return "sleeping" if pauses.state.sleeping else "paused" if pauses.paused else "running"


def _model(front: Front) -> Facts:
    config, ready = front.config, front.engine.ready
    return {
        "name": config.model_name,
        "dtype": ready.dtype,
        "device": ready.device,
        "layers": ready.num_layers,
        "context_length": ready.context_length,
        "tp_size": config.tp_size,
        "enable_lora": config.enable_lora,
        "lora_backend": ready.lora_backend,
        "attention_backend": ready.attention_backend,
    }


def _caller(front: Front, caller: Caller) -> Facts:
    """What the key may do: the page offers nothing else."""
    return {
        "key_id": caller.key_id,
        "tenant": caller.tenant.name,
        "admin": caller.admin,
        "loads": caller.admin or bool(front.registry.tenants and caller.load),
        "pins": caller.admin or caller.pin,
    }


def _arena(front: Front) -> Facts:
    stats = front.engine.stats
    return {
        "page_bytes": stats.page_bytes,
        "total_pages": stats.total_pages,
        "free_pages": stats.free_pages,
        "kv_pages": stats.kv_pages,
        "prefix_pages": stats.prefix_pages,
        "adapter_pages": stats.adapter_pages,
        "slots_used": stats.slots_used,
        "slots_total": stats.slots_total,
    }


def _counters(front: Front, totals: Totals) -> Facts:
    """Counters only grow; the page shows their rates. Latencies are sums of seconds, with their counts."""
    stats = front.engine.stats
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "preemptions": stats.preemptions,
        "engine_restarts": front.engine.restarts,
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
        "generated_tokens": totals.generated_tokens,
        "endings": dict(totals.endings),
        "first_token": [totals.first_token.sum, totals.first_token.count],
        "inter_token": [totals.inter_token.sum, totals.inter_token.count],
    }


def _queues(front: Front, caller: Caller) -> list[Facts]:
    """Open requests by tenant, those without any output yet as waiting; of a tenant's key its own."""
    waiting, running = Counter[str](), Counter[str]()
    for tenant, started in front.open_samples():
        (running if started else waiting)[tenant] += 1
    names = sorted(waiting.keys() | running.keys())
    return [
        {"tenant": name, "waiting": waiting[name], "running": running[name]}
        for name in names
        if not caller.tenant.name or name == caller.tenant.name
    ]


def _adapters(front: Front, caller: Caller) -> list[Facts]:
    by_version = {stats.version: stats for stats in front.engine.stats.adapters}
    seen = seen_adapters(front.registry)
    return [_adapter(adapter, by_version.get(adapter.ref.version), caller) for adapter in seen]


def _adapter(adapter: SeenAdapter, stats: AdapterStats | None, caller: Caller) -> Facts:
    """level: device, host or disk; "composition": it has no weights of its own. Who else uses an adapter that is not
    the caller's own stays unsaid."""
    ref, mine = adapter.ref, caller.admin or caller.owns(adapter.ref.name)
    facts: Facts = {
        "name": adapter.name,
        "path": adapter.path,
        "version": ref.version,
        "weight_version": ref.weight_version,
        "state": ref.state.value,
        "pinned": ref.pinned,
        "rank": ref.info.rank if ref.info else None,
        "target_modules": ref.info.target_modules if ref.info else None,
        "level": "composition" if ref.parts else stats.level if stats else "disk",
        "own": mine,
    }
    if mine:
        facts["requests"] = ref.num_requests
    if mine and stats is not None:
        names = ("host_bytes", "device_bytes", "loads", "evictions", "fetches", "hits", "misses", "load_seconds")
        facts |= {name: getattr(stats, name) for name in names}
    return facts
