"""The routes by which a trainer holds the engine: pause and resume, sleep and wake up, abort, empty the prefix cache.

In vLLM's words and in SGLang's; `front/pause_manager.py` knows what they mean. While the engine is paused or asleep
`/health` stays 200.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Response

from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import BadRequest
from multilora.front.front import Front
from multilora.server.bodies import AbortRequestsBody, ContinueBody, MemoryBody, PauseBody, ResetCacheBody
from multilora.server.streaming import Json
from multilora.server.strict_route import StrictRoute

NO_LIMIT_RANK, NO_LIMIT_COUNT = 512, 1 << 20
"""What a client reads where no limit is set: it compares integers."""

_SGLANG_MODES = {"abort": "abort", "retract": "retract", "in_place": "keep"}


def router(driver: AsyncDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)
    _pauses(routes, driver)
    _sleep(routes, driver)
    _requests(routes, driver)
    _facts(routes, driver.front)
    return routes


def _pauses(routes: APIRouter, driver: AsyncDriver) -> None:
    pauses = driver.front.pauses

    @routes.post("/pause")
    async def pause(mode: str = "abort", *, clear_cache: bool = True) -> Response:
        """As vLLM: freeze (`keep`), finish (`wait`) or abort what runs, and generate nothing until /resume. Answered
        once the engine is at rest. New requests wait with `keep`, else they are 503."""
        await driver.change(pauses.pause(mode, clear_cache=clear_cache))
        return Json({"status": "paused"})

    @routes.post("/resume")
    async def resume() -> Response:
        """As vLLM: go on where /pause has stopped."""
        await driver.change(pauses.resume())
        return Json({"status": "resumed"})

    @routes.get("/is_paused")
    async def is_paused() -> Response:
        """As vLLM."""
        return Json({"is_paused": pauses.paused})

    @routes.post("/pause_generation")
    async def pause_generation(body: Annotated[PauseBody | None, Body()] = None) -> Response:
        """As SGLang: requests that come meanwhile wait, in each mode."""
        mode = _SGLANG_MODES.get(body.mode if body else "abort")
        if mode is None:
            raise BadRequest(f"mode: must be one of {', '.join(_SGLANG_MODES)}", param="mode")
        await driver.change(pauses.pause(mode, queues=True))
        return Json({"message": "Generation paused successfully.", "status": "ok"})

    @routes.post("/continue_generation")
    async def continue_generation(_body: Annotated[ContinueBody | None, Body()] = None) -> Response:
        """As SGLang."""
        await driver.change(pauses.resume())
        return Json({"message": "Generation continued successfully.", "status": "ok"})


def _sleep(routes: APIRouter, driver: AsyncDriver) -> None:
    pauses = driver.front.pauses

    @routes.post("/sleep")
    async def sleep(
        level: int = 1, mode: str = "abort", tags: Annotated[list[str] | None, Query()] = None
    ) -> Response:
        """As vLLM: pause, and release the device's memory until /wake_up; requests are 503 meanwhile."""
        await driver.change(pauses.sleep(level, mode, tags))
        return Json({"status": "sleeping", "level": level})

    @routes.post("/release_kv_cache_memory")
    async def release_kv_cache() -> Response:
        """As vLLM: release the arena alone, until /wake_up?tags=kv_cache. Running requests are computed anew then."""
        await driver.change(pauses.sleep(mode=None, tags=["kv_cache"]))
        return Json({"status": "kv_cache_released"})

    @routes.post("/wake_up")
    async def wake_up(tags: Annotated[list[str] | None, Query()] = None) -> Response:
        """As vLLM: take memory back, all or that of `tags`, and go on once nothing is missing."""
        awake = await driver.change(pauses.wake_up(tags))
        return Json({"status": "awake" if awake else "sleeping", "tags": tags})

    @routes.get("/is_sleeping")
    async def is_sleeping() -> Response:
        """As vLLM, but a pause alone is no sleep."""
        return Json({"is_sleeping": pauses.state.sleeping})

    @routes.get("/release_memory_occupation")
    @routes.post("/release_memory_occupation")
    async def release(body: Annotated[MemoryBody | None, Body()] = None) -> Response:
        """As SGLang; running requests are computed anew afterwards. A pause that is there already outlasts this."""
        await driver.change(pauses.sleep(mode=None, tags=body.tags if body else None))
        return Json(None)

    @routes.get("/resume_memory_occupation")
    @routes.post("/resume_memory_occupation")
    async def take_back(body: Annotated[MemoryBody | None, Body()] = None) -> Response:
        """As SGLang."""
        await driver.change(pauses.wake_up(body.tags if body else None))
        return Json(None)


def _requests(routes: APIRouter, driver: AsyncDriver) -> None:
    front = driver.front

    def abort(body: AbortRequestsBody | None) -> int:
        rids = list(dict.fromkeys(body.request_ids or [])) if body else []
        return sum(front.abort(rid) for rid in rids) if rids else front.abort(None)

    @routes.post("/abort_requests")
    async def abort_requests(body: Annotated[AbortRequestsBody | None, Body()] = None) -> Response:
        """As vLLM: end these requests, or all, without a pause."""
        return Json({"status": "aborted", "aborted": abort(body)})

    @routes.post("/inference/v1/abort_requests")
    async def abort_inference_requests(body: Annotated[AbortRequestsBody | None, Body()] = None) -> Response:
        """As vLLM."""
        abort(body)
        return Response()

    @routes.post("/reset_prefix_cache")
    async def reset_prefix_cache(
        body: Annotated[ResetCacheBody | None, Body()] = None, *, reset_running_requests: bool = False
    ) -> Response:
        """As vLLM: empty the prefix cache; the flag, in the query or the body, has running requests computed anew."""
        retract = reset_running_requests or bool(body and body.reset_running_requests)
        await driver.change(front.pauses.flush(retract=retract))
        return Json({"success": True})


def _facts(routes: APIRouter, front: Front) -> None:
    @routes.get("/get_world_size")
    async def get_world_size(*, include_dp: bool = True) -> Response:  # noqa: ARG001 - there is no data parallelism
        """As vLLM: how many devices compute."""
        return Json({"world_size": world_size(front)})


def world_size(front: Front) -> int:
    """Devices that compute one step together."""
    return front.config.tp_size


def vllm_config(front: Front) -> dict[str, Any]:
    """What clients of vLLM read of its configuration, under vLLM's names. Without a limit of our own there is a large
    number, as clients compare."""
    config, ready, size = front.config, front.engine.ready, world_size(front)
    lora = {
        "max_lora_rank": config.max_lora_rank or NO_LIMIT_RANK,
        "max_loras": config.max_loras_per_batch or NO_LIMIT_COUNT,
        "max_cpu_loras": config.max_loaded_loras or NO_LIMIT_COUNT,
    }
    path = config.model_path or config.model_name
    return {
        "model_config": {
            "model": path,
            "tokenizer": config.tokenizer_path or path,
            "served_model_name": config.model_name,
            "dtype": f"torch.{ready.dtype.removeprefix('torch.')}",
            "max_model_len": ready.context_length,
        },
        "lora_config": lora if config.enable_lora else None,
        "parallel_config": {
            "tensor_parallel_size": size,
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "world_size": size,
            "world_size_across_dp": size,
        },
        "cache_config": {"block_size": config.page_size, "enable_prefix_caching": not config.disable_radix_cache},
        "scheduler_config": {
            "max_num_seqs": config.max_running_requests,
            "max_num_batched_tokens": config.chunked_prefill_size,
        },
    }
