"""The routes that load and unload adapters while requests run, in SGLang's, vLLM's and SkyRL's shapes."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.types import Receive

from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import AdapterAlreadyLoaded, AdapterNotFound, AdapterNotLoaded, BadRequest, Forbidden
from multilora.front.access import CALLER
from multilora.front.adapter_view import seen_paths
from multilora.front.registry import AdapterRegistry
from multilora.server.bodies import (
    LoadAdapterBody,
    LoadBody,
    SkyrlLoadAdapterBody,
    UnloadAdapterBody,
    V1LoadAdapterBody,
    V1UnloadAdapterBody,
)
from multilora.server.errors import error_response, shortened
from multilora.server.streaming import Json, while_connected
from multilora.server.strict_route import StrictRoute
from multilora.server.tensors import LoadTensorsBody, TensorsRoute

NATIVE_PATHS = ("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter")


def native_result(registry: AdapterRegistry, error: str = "") -> dict[str, Any]:
    """SGLang's answer to a load or unload, success or not; its keys in its order."""
    return {
        "rid": None,
        "http_worker_ipc": None,
        "success": not error,
        "error_message": shortened(error),
        "loaded_adapters": seen_paths(registry),
    }


def router(driver: AsyncDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)
    loads = _Loads(driver)
    _sglang_routes(routes, driver, loads)
    _vllm_routes(routes, driver, loads)
    _skyrl_route(routes, loads)
    routes.include_router(_tensor_routes(driver, loads))
    return routes


class _Loads:
    """The load calls of all routes. upsert, update: --lora-load-mode, which lets each of them replace a loaded
    adapter, and requests that run go on with the new one."""

    def __init__(self, driver: AsyncDriver):
        self.update = driver.front.config.lora_load_mode == "update"
        self.upsert = self.update or driver.front.config.lora_load_mode == "upsert"
        self._driver = driver
        self._adapters = driver.front.adapters

    async def from_path(self, body: LoadAdapterBody, receive: Receive, *, replace: bool) -> int | None:
        """Load the adapter, or name the composition, that `lora_path` says. Returns the adapter's version. A load
        whose client hangs up is given up."""
        options = self._options(body, replace)
        if isinstance(body.lora_path, list):
            options.pop("allow_update_mid_request")
            if body.allow_update_mid_request:
                raise BadRequest(
                    "allow_update_mid_request: a composition has no weights of its own; replace its parts",
                    param="allow_update_mid_request",
                )
            await self._driver.change(self._adapters.compose(body.lora_name, body.lora_path, **options))
            return None
        load = self._adapters.load(body.lora_name, body.lora_path, **options)
        return (await while_connected(receive, self._driver.load(load))).version

    async def from_tensors(self, body: LoadTensorsBody, receive: Receive, *, replace: bool) -> None:
        if body.load_format == "shared_memory" and CALLER.get().tenant.name:
            raise Forbidden("load_format: this key may not read the server's shared memory", param="load_format")
        options = self._options(body, replace)
        load = self._adapters.load_tensors(body.lora_name, body.config_dict, body.writer(), **options)
        await while_connected(receive, self._driver.load(load))

    def _options(self, body: LoadBody, replace: bool) -> dict[str, Any]:
        replace = replace or body.upsert or self.upsert
        update = self.update if body.allow_update_mid_request is None else body.allow_update_mid_request
        return {
            "pinned": body.pinned,
            "replace": replace,
            "weight_version": body.weight_version,
            "allow_update_mid_request": update,
        }


def _sglang_routes(routes: APIRouter, driver: AsyncDriver, loads: _Loads) -> None:
    adapters, registry = driver.front.adapters, driver.front.registry

    @routes.post("/load_lora_adapter")
    async def load(body: LoadAdapterBody, request: Request, inplace: bool = False) -> Response:
        """Load an adapter, as SGLang; or name a composition of loaded ones."""
        try:
            await loads.from_path(body, request.receive, replace=inplace)
        except AdapterNotFound as e:
            if not loads.upsert:
                raise
            return Json(native_result(registry, e.message), 404)
        return Json(native_result(registry))

    @routes.post("/unload_lora_adapter")
    async def unload(body: UnloadAdapterBody) -> Response:
        """Unload an adapter once its requests have ended, as SGLang."""
        await driver.change(adapters.unload(body.lora_name))
        return Json(native_result(registry))


def _tensor_routes(driver: AsyncDriver, loads: _Loads) -> APIRouter:
    routes = APIRouter(route_class=TensorsRoute)

    @routes.post("/load_lora_adapter_from_tensors")
    async def load_from_tensors(body: LoadTensorsBody, request: Request, inplace: bool = False) -> Response:
        """Load an adapter whose weights are in the request or in shared memory, as SGLang but without pickle."""
        await loads.from_tensors(body, request.receive, replace=inplace)
        return Json(native_result(driver.front.registry))

    return routes


def _vllm_routes(routes: APIRouter, driver: AsyncDriver, loads: _Loads) -> None:
    adapters = driver.front.adapters

    @routes.post("/v1/load_lora_adapter")
    async def v1_load(body: V1LoadAdapterBody, request: Request, inplace: bool = False) -> Response:
        """Load an adapter or, with load_inplace, replace it; as vLLM."""
        try:
            await loads.from_path(body, request.receive, replace=inplace or body.load_inplace)
        except AdapterNotFound as e:
            return error_response(e, status=404)
        except AdapterAlreadyLoaded as e:
            e.message = (
                f"The lora adapter '{body.lora_name}' has already been loaded. "
                "If you want to load the adapter in place, set 'load_inplace' to True."
            )
            raise
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter")
    async def v1_unload(body: V1UnloadAdapterBody) -> Response:
        """Unload an adapter once its requests have ended, as vLLM."""
        try:
            await driver.change(adapters.unload(body.lora_name))
        except AdapterNotLoaded as e:
            e.message = f"The lora adapter '{body.lora_name}' cannot be found."
            return error_response(e, status=404)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _skyrl_route(routes: APIRouter, loads: _Loads) -> None:
    @routes.post("/skyrl/v1/load_lora_adapter")
    async def skyrl_load(body: SkyrlLoadAdapterBody, request: Request) -> Response:
        """Load an adapter or replace it, as SkyRL's servers."""
        try:
            version = await loads.from_path(body, request.receive, replace=True)
        except AdapterNotFound as e:
            return error_response(e, status=404)
        return Json({"status": "ok", "lora_name": body.lora_name, "lora_int_id": version})
