"""`POST /classify` and `POST /v1/classify`: what texts are classified as.

On `/classify` a body with `input` or `messages` is vLLM's and is answered in its form, which is SGLang's on
`/v1/classify`, too; one with `text` or `input_ids` is that of SGLang's native route, which gives the head's scores.
"""

from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.async_generation import AsyncGeneration
from multilora.drivers.request_driver import RequestDriver
from multilora.errors import BadRequest
from multilora.front.classification import CLASSIFY, classification_of
from multilora.server.pooling.bodies import ClassifyBody
from multilora.server.pooling.reading import listing, meta_info, read_jobs, respond
from multilora.server.resolving import resolved
from multilora.server.strict_route import StrictRoute

LABELS = 16
"""About how many numbers there are for a text."""


def router(driver: RequestDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/classify")
    @routes.post("/v1/classify")
    async def classify(request: Request, body: ClassifyBody) -> Response:
        """The label and the probabilities of one text or many, each by its own adapter's head."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            if body.is_native:
                return await classify_natively(request, driver, body)
            return await classify_texts(request, driver, body)

    return routes


async def classify_texts(request: Request, driver: RequestDriver, body: ClassifyBody) -> Response:
    """Answer in vLLM's form. use_activation false: `probs` are the head's own scores."""
    front, settings = driver.front, driver.front.engine.ready.classifier
    prompts, several = body.prompts(front.engine.ready.context_length)
    jobs = read_jobs(front, body, prompts, CLASSIFY)

    def answer(generation: AsyncGeneration) -> dict[str, Any]:
        data = []
        for sample in generation.samples:
            found = classification_of(sample, settings)
            numbers = found.scores if body.use_activation is False else found.probabilities
            item = {"label": found.label, "probs": numbers.tolist(), "num_classes": len(numbers)}
            data.append({"index": sample.index} | item)
        return listing(generation, body, front, "classify", data)

    return await respond(request, driver, jobs, body.rids(len(jobs), several=several), answer, len(jobs) * LABELS)


async def classify_natively(request: Request, driver: RequestDriver, body: ClassifyBody) -> Response:
    """Answer in the form of SGLang's native routes, in which scores are an `embedding`."""
    if body.use_activation:
        raise BadRequest("use_activation: only with input or messages", param="use_activation")
    prompts, several = body.native_prompts(driver.front.engine.ready.context_length)
    jobs = read_jobs(driver.front, body, prompts, CLASSIFY, "input_ids")
    settings = driver.front.engine.ready.classifier

    def answer(generation: AsyncGeneration) -> Any:
        found = [
            {"embedding": classification_of(sample, settings).scores.tolist(), "meta_info": meta_info(sample)}
            for sample in generation.samples
        ]
        return found if several else found[0]

    return await respond(request, driver, jobs, body.rids(len(jobs), several=several), answer, len(jobs) * LABELS)
