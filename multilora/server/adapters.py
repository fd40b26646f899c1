"""The five routes that load and unload adapters while requests run, in SGLang's and vLLM's shapes."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import AdapterAlreadyLoaded, AdapterNotFound, AdapterNotLoaded
from multilora.front.registry import AdapterRegistry
from multilora.server.bodies import LoadAdapterBody, UnloadAdapterBody, V1LoadAdapterBody, V1UnloadAdapterBody
from multilora.server.errors import StrictRoute, error_response
from multilora.server.streaming import Json
from multilora.server.tensors import LoadTensorsBody, TensorsRoute, write_weights

NATIVE_PATHS = ("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter")


def native_result(registry: AdapterRegistry, error: str = "") -> dict[str, Any]:
    """SGLang's answer to a load or unload, success or not; its keys in its order."""
    return {
        "rid": None,
        "http_worker_ipc": None,
        "success": not error,
        "error_message": error,
        "loaded_adapters": registry.loaded(),
    }


def router(driver: AsyncDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)
    _sglang_routes(routes, driver)
    _vllm_routes(routes, driver)
    routes.include_router(_tensor_routes(driver))
    return routes


def _sglang_routes(routes: APIRouter, driver: AsyncDriver) -> None:
    adapters, registry = driver.front.adapters, driver.front.registry

    @routes.post("/load_lora_adapter")
    async def load(body: LoadAdapterBody) -> Response:
        """Load an adapter, as SGLang; or name a composition of loaded ones."""
        if isinstance(body.lora_path, list):
            await driver.change(adapters.compose(body.lora_name, body.lora_path, pinned=body.pinned))
        else:
            await driver.change(adapters.load(body.lora_name, body.lora_path, pinned=bool(body.pinned)))
        return Json(native_result(registry))

    @routes.post("/unload_lora_adapter")
    async def unload(body: UnloadAdapterBody) -> Response:
        """Unload an adapter once its requests have ended, as SGLang."""
        await driver.change(adapters.unload(body.lora_name))
        return Json(native_result(registry))


def _tensor_routes(driver: AsyncDriver) -> APIRouter:
    routes = APIRouter(route_class=TensorsRoute)
    adapters, registry = driver.front.adapters, driver.front.registry

    @routes.post("/load_lora_adapter_from_tensors")
    async def load_from_tensors(body: LoadTensorsBody) -> Response:
        """Load an adapter whose weights are in the request, as SGLang but without pickle."""
        write = partial(write_weights, *body.weights())
        load = adapters.load_tensors(body.lora_name, body.config_dict, write, pinned=bool(body.pinned))
        await driver.change(load)
        return Json(native_result(registry))

    return routes


def _vllm_routes(routes: APIRouter, driver: AsyncDriver) -> None:
    adapters = driver.front.adapters

    @routes.post("/v1/load_lora_adapter")
    async def v1_load(body: V1LoadAdapterBody) -> Response:
        """Load an adapter or, with load_inplace, replace it; as vLLM."""
        name, path = body.lora_name, body.lora_path
        options: dict[str, Any] = {"pinned": body.pinned, "replace": body.load_inplace}
        try:
            if isinstance(path, list):
                await driver.change(adapters.compose(name, path, **options))
            else:
                await driver.change(adapters.load(name, path, **options))
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
            await driver.change(adapters.unload(body.lora_name))
        except AdapterNotLoaded as e:
            e.message = f"The lora adapter '{body.lora_name}' cannot be found."
            return error_response(e, status=404)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
