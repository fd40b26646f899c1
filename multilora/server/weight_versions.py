"""Which weights an answer comes from, on the wire; and the routes of the server's own label.

SGLang writes it into `meta_info` and `metadata`, vLLM into `weight_versions` of a choice: spans of its tokens, each
with the label. Here the number of the adapter version (`lora_version`) stands beside the label everywhere.
"""

from typing import Any

from fastapi import APIRouter, Response

from multilora.drivers.async_driver import AsyncDriver
from multilora.front.generation import Sample
from multilora.server.bodies import Body
from multilora.server.streaming import Json
from multilora.server.strict_route import StrictRoute


class WeightVersionBody(Body):
    """`POST /update_weight_version`."""

    where = "/update_weight_version"
    new_version: str
    abort_all_requests: bool = False


def router(driver: AsyncDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)
    registry = driver.front.registry

    @routes.post("/update_weight_version")
    async def update_weight_version(body: WeightVersionBody) -> Response:
        """Set the label of the base model and of adapters that have none of their own, as SGLang and vLLM."""
        await driver.change(driver.front.adapters.label_weights(body.new_version))
        if body.abort_all_requests:
            driver.front.abort(None, "aborted by /update_weight_version")
        message = f"Weight version updated to {body.new_version}"
        return Json({"success": True, "message": message, "new_version": body.new_version})

    @routes.get("/weight_info")
    async def weight_info() -> Response:
        """The server's label, as vLLM."""
        return Json({"weight_version": registry.weight_version})

    return routes


def weight_metadata(sample: Sample) -> dict[str, Any]:
    """What the last token of the sample comes from: `weight_version` and `lora_version`, null for the base model."""
    label = sample.label
    return {"weight_version": label.weight_version, "lora_version": label.lora_version}


def changed_weights(sample: Sample) -> dict[str, Any]:
    """`weight_versions`, if the adapter was replaced in the middle of the answer; else nothing."""
    spans = weight_version_spans(sample)
    return {"weight_versions": spans} if len(spans) > 1 else {}


def all_weights(sample: Sample) -> dict[str, Any]:
    """`weight_metadata`, and `changed_weights`."""
    return weight_metadata(sample) | changed_weights(sample)


def weight_version_spans(sample: Sample) -> list[dict[str, Any]]:
    """vLLM's `weight_versions` of a choice: output tokens [start, end) come from the weights labelled `version`, an
    adapter's if `lora_version` is not null."""
    return [
        {
            "version": span.label.weight_version,
            "start": span.start,
            "end": span.end,
            "lora_version": span.label.lora_version,
        }
        for span in sample.version_spans
    ]
