"""`POST /v1/embeddings`, OpenAI's with vLLM's and SGLang's fields, and `POST /encode`, SGLang's native route."""

import base64
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.async_generation import AsyncGeneration
from multilora.drivers.request_driver import RequestDriver
from multilora.front.embedding import check_dimensions, vector_of
from multilora.params import PoolingParams
from multilora.server.pooling.bodies import EmbeddingsBody, EncodeBody
from multilora.server.pooling.reading import listing, meta_info, read_jobs, respond
from multilora.server.resolving import resolved
from multilora.server.strict_route import StrictRoute


def router(driver: RequestDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingsBody) -> Response:
        """The embedding of one text or many, each with its own adapter."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            return await embed(request, driver, body)

    @routes.post("/encode")
    async def encode(request: Request, body: EncodeBody) -> Response:
        """The embedding of one text or many, as SGLang's native route says it."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            return await encode_natively(request, driver, body)

    return routes


async def embed(request: Request, driver: RequestDriver, body: EmbeddingsBody) -> Response:
    """Answer `/v1/embeddings`. use_activation is vLLM's word for scaling to length 1."""
    front, settings = driver.front, driver.front.engine.ready.embedding
    dimensions, as_base64 = check_dimensions(body.dimensions, settings.size), body.as_base64
    normalize = settings.normalize if body.use_activation is None else body.use_activation
    prompts, several = body.prompts(front.engine.ready.context_length)
    jobs = read_jobs(front, body, prompts, PoolingParams(settings.method))

    def answer(generation: AsyncGeneration) -> dict[str, Any]:
        data = []
        for sample in generation.samples:
            vector = vector_of(sample, dimensions, normalize=normalize)
            written = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist()
            data.append({"object": "embedding", "index": sample.index, "embedding": written})
        return listing(generation, body, front, "embd", data)

    rids = body.rids(len(jobs), several=several)
    return await respond(request, driver, jobs, rids, answer, len(jobs) * settings.size)


async def encode_natively(request: Request, driver: RequestDriver, body: EncodeBody) -> Response:
    """Answer `/encode`."""
    front, settings = driver.front, driver.front.engine.ready.embedding
    dimensions = check_dimensions(body.dimensions, settings.size)
    prompts, several = body.native_prompts(front.engine.ready.context_length)
    jobs = read_jobs(front, body, prompts, PoolingParams(settings.method), "input_ids")

    def answer(generation: AsyncGeneration) -> Any:
        found = [
            {
                "embedding": vector_of(sample, dimensions, normalize=settings.normalize).tolist(),
                "meta_info": meta_info(sample),
            }
            for sample in generation.samples
        ]
        return found if several else found[0]

    rids = body.rids(len(jobs), several=several)
    return await respond(request, driver, jobs, rids, answer, len(jobs) * settings.size)
