"""Loading and unloading adapters while requests run: the five routes, in SGLang's and vLLM's shapes.

`AdapterManager` drives the registry and the engine through one change; a change that has begun is carried through
even if its client hangs up. The registry decides who gets which version; the engine does the work.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from multilora.adapters.sources.spool import TENSOR_ROOT, Spool
from multilora.config import LoraPath
from multilora.engine.messages import AdapterInfo
from multilora.errors import AdapterAlreadyLoaded, AdapterNotFound, AdapterNotLoaded, BadRequest, MultiloraError
from multilora.front.adapter_spec import parse_composition, show
from multilora.front.registry import AdapterRegistry
from multilora.front.vocabulary import Vocabularies
from multilora.server.bodies import LoadAdapterBody, UnloadAdapterBody, V1LoadAdapterBody, V1UnloadAdapterBody
from multilora.server.client import Client
from multilora.server.errors import StrictRoute, error_response
from multilora.server.metrics import Metrics
from multilora.server.streaming import Json
from multilora.server.tensors import BoundedRoute, LoadTensorsBody, write_weights

logger = logging.getLogger(__name__)

NATIVE_PATHS = ("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter")
MAX_LOADS = 8  # at a time, of --lora-paths

T = TypeVar("T")


class AdapterManager:
    """One per server. `spool`: where adapters that come as tensors are kept; `vocabularies`: told of each adapter."""

    def __init__(
        self,
        client: Client,
        registry: AdapterRegistry,
        metrics: Metrics,
        spool: Spool,
        vocabularies: Vocabularies,
    ):
        self.registry = registry
        self._client = client
        self._metrics = metrics
        self._spool = spool
        self._vocabularies = vocabularies
        self._tasks: set[asyncio.Task[Any]] = set()

    async def load(self, name: str, path: str, *, pinned: bool | None = None, replace: bool = False) -> AdapterInfo:
        """Load `name` and let requests use it. With `replace` the name may be taken: requests in flight keep the
        old version, which is unloaded when they end. `pinned` None: as the replaced one, else no."""
        return await self._carry_through(self._load(name, path, pinned, replace))

    async def load_tensors(
        self, name: str, config: dict[str, Any], write: Callable[[Path], None], *, pinned: bool = False
    ) -> AdapterInfo:
        """Load an adapter whose adapter_config.json is `config` and whose .safetensors file `write(path)` writes."""
        return await self._carry_through(self._load_tensors(name, config, write, pinned))

    def compose(self, name: str, parts: list[Any], *, pinned: bool | None = None, replace: bool = False) -> None:
        """Let `name` stand for a composition of loaded adapters, each a {name, weight}."""
        if pinned:
            raise BadRequest("pinned: a composition has no weights of its own; pin its parts", param="pinned")
        spec = parse_composition(parts)
        replaced = self.registry.compose(name, spec, replace=replace)
        logger.info("adapter %r is now %s", name, show(spec))
        if replaced is not None:
            self._spawn(self._drop(replaced))

    async def unload(self, name: str) -> None:
        """Refuse new requests for `name`, wait for those it has, and free it."""
        await self._carry_through(self._unload(name))

    async def load_all(self, paths: Sequence[LoraPath]) -> None:
        """Load --lora-paths, several at a time; all or the first error."""
        limit = asyncio.Semaphore(MAX_LOADS)

        async def fetch(version: int, entry: LoraPath) -> AdapterInfo:
            async with limit:
                return await self._fetch(version, entry.lora_path, entry.pinned)

        versions = [self.registry.begin_load(p.lora_name, p.lora_path, p.pinned) for p in paths]
        tasks = [asyncio.create_task(fetch(v, p)) for v, p in zip(versions, paths, strict=True)]
        try:
            infos = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            for version in versions:
                self.registry.fail_load(version)
            raise
        for version, info, entry in zip(versions, infos, paths, strict=True):
            self.registry.commit_load(version, info)
            _log_loaded(entry.lora_name, info)

    async def _load(self, name: str, path: str, pinned: bool | None, replace: bool) -> AdapterInfo:
        if pinned is None:
            pinned = any(e.name == name and e.pinned for e in self.registry.entries())
        version = self.registry.begin_load(name, path, pinned, replace=replace)
        try:
            info = await self._fetch(version, path, pinned)
        except BaseException:
            self.registry.fail_load(version)
            raise
        replaced = self.registry.commit_load(version, info)
        _log_loaded(name, info)
        if replaced is not None:
            self._spawn(self._drop(replaced))
        return info

    async def _fetch(self, version: int, path: str, pinned: bool, *, with_files: bool = True) -> AdapterInfo:
        """Into the engine, and its tokens to the front. with_files: a tokenizer may lie beside its weights."""
        info = await self._client.load_adapter(version, path, pinned)
        if self._vocabularies.concerns(info):
            try:
                await asyncio.to_thread(self._vocabularies.add, info, path if with_files else None)
            except BaseException:
                await self._client.unload_adapter(version)
                raise
        return info

    async def _load_tensors(
        self, name: str, config: dict[str, Any], write: Callable[[Path], None], pinned: bool
    ) -> AdapterInfo:
        version = self.registry.begin_load(name, TENSOR_ROOT, pinned)
        try:
            path = str(await asyncio.to_thread(self._spool.add, version, config, write))
            try:
                info = await self._fetch(version, path, pinned, with_files=False)
            except MultiloraError as e:
                e.message = e.message.replace(path, TENSOR_ROOT)
                raise
        except BaseException:
            self.registry.fail_load(version)
            self._spool.remove(version)
            raise
        self.registry.commit_load(version, info)
        _log_loaded(name, info)
        return info

    async def _unload(self, name: str) -> None:
        version = self.registry.begin_unload(name)
        await self._drop(version)
        self._metrics.forget(name)
        logger.info("adapter %r unloaded", name)

    async def _drop(self, version: int) -> None:
        """Wait until no request holds the version, then free it."""
        idle = asyncio.Event()
        self.registry.when_idle(version, idle.set)
        await idle.wait()
        try:
            if not self.registry.is_composition(version):
                await self._client.unload_adapter(version)
        finally:
            self.registry.finish_unload(version)
            self._spool.remove(version)
            self._vocabularies.remove(version)

    async def _carry_through(self, change: Coroutine[Any, Any, T]) -> T:
        return await asyncio.shield(self._spawn(change))

    def _spawn(self, change: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            if isinstance(error, MultiloraError):
                logger.info("adapter change failed: %s", error)
            else:
                logger.error("adapter change failed", exc_info=error)


def _log_loaded(name: str, info: AdapterInfo) -> None:
    logger.info("adapter %r loaded: rank %d, %d bytes, %s", name, info.rank, info.nbytes, info.path)


def native_result(registry: AdapterRegistry, error: str = "") -> dict[str, Any]:
    """SGLang's answer to a load or unload, success or not; its keys in its order."""
    return {
        "rid": None,
        "http_worker_ipc": None,
        "success": not error,
        "error_message": error,
        "loaded_adapters": registry.loaded(),
    }


def router(manager: AdapterManager) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)
    _sglang_routes(routes, manager)
    _vllm_routes(routes, manager)
    routes.include_router(_tensor_routes(manager))
    return routes


def _sglang_routes(routes: APIRouter, manager: AdapterManager) -> None:
    registry = manager.registry

    @routes.post("/load_lora_adapter")
    async def load(body: LoadAdapterBody) -> Response:
        """Load an adapter, as SGLang; or name a composition of loaded ones."""
        if isinstance(body.lora_path, list):
            manager.compose(body.lora_name, body.lora_path, pinned=body.pinned)
        else:
            await manager.load(body.lora_name, body.lora_path, pinned=bool(body.pinned))
        return Json(native_result(registry))

    @routes.post("/unload_lora_adapter")
    async def unload(body: UnloadAdapterBody) -> Response:
        """Unload an adapter once its requests have ended, as SGLang."""
        await manager.unload(body.lora_name)
        return Json(native_result(registry))


def _tensor_routes(manager: AdapterManager) -> APIRouter:
    routes = APIRouter(route_class=BoundedRoute)

    @routes.post("/load_lora_adapter_from_tensors")
    async def load_from_tensors(body: LoadTensorsBody) -> Response:
        """Load an adapter whose weights are in the request, as SGLang but without pickle."""
        write = partial(write_weights, *body.weights())
        await manager.load_tensors(body.lora_name, body.config_dict, write, pinned=bool(body.pinned))
        return Json(native_result(manager.registry))

    return routes


def _vllm_routes(routes: APIRouter, manager: AdapterManager) -> None:
    @routes.post("/v1/load_lora_adapter")
    async def v1_load(body: V1LoadAdapterBody) -> Response:
        """Load an adapter or, with load_inplace, replace it; as vLLM."""
        name = body.lora_name
        try:
            if isinstance(body.lora_path, list):
                manager.compose(name, body.lora_path, pinned=body.pinned, replace=body.load_inplace)
            else:
                await manager.load(name, body.lora_path, pinned=body.pinned, replace=body.load_inplace)
        except AdapterNotFound as e:
            return error_response(e, status=404)
        except AdapterAlreadyLoaded as e:
            e.message = (
                f"The lora adapter '{name}' has already been loaded. "
                "If you want to load the adapter in place, set 'load_inplace' to True."
            )
            raise
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter")
    async def v1_unload(body: V1UnloadAdapterBody) -> Response:
        """Unload an adapter once its requests have ended, as vLLM."""
        try:
            await manager.unload(body.lora_name)
        except AdapterNotLoaded as e:
            e.message = f"The lora adapter '{body.lora_name}' cannot be found."
            return error_response(e, status=404)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
