"""`POST /v1/score` and `/score`, `POST /v1/rerank`, `/v2/rerank` and `/rerank`: how well pairs of texts go together.

As vLLM scores them, and as Jina's and Cohere's clients have documents ranked. Which way a score is made is
`front/scoring.py`'s choice.
"""

import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.async_generation import AsyncGeneration
from multilora.drivers.request_driver import RequestDriver
from multilora.front.adapter_spec import parse_specs
from multilora.front.embedding import READ_ONLY
from multilora.front.generation import Job
from multilora.front.prompt import check_priority, check_timeout
from multilora.front.request_front import RequestFront
from multilora.front.scoring import Scoring, TextPairs, ranking, scoring_of
from multilora.server.pooling.bodies import PairsBody, RerankBody, ScoreBody
from multilora.server.pooling.reading import listing, respond, usage
from multilora.server.resolving import resolved
from multilora.server.strict_route import StrictRoute
from multilora.server.weight_versions import weight_metadata


def router(driver: RequestDriver) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/v1/score")
    @routes.post("/score")
    async def score(request: Request, body: ScoreBody) -> Response:
        """How well texts go together: one with each, or each with its counterpart."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            return await score_pairs(request, driver, body)

    @routes.post("/v1/rerank")
    @routes.post("/v2/rerank")
    @routes.post("/rerank")
    async def rerank(request: Request, body: RerankBody) -> Response:
        """Documents by how well they answer a query, the best first."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            return await rank_documents(request, driver, body)

    return routes


def read_pairs(front: RequestFront, body: PairsBody, pairs: TextPairs) -> Scoring:
    """What the engine is asked. Raises UnknownModel, UnknownAdapter, BadRequest."""
    [given] = parse_specs(body.lora_path, 1)
    spec = front.registry.resolve_model(body.model, given)
    priority, timeout = check_priority(body.priority), check_timeout(body.timeout)
    common = Job(prompt=[], sampling=READ_ONLY, salt=body.salts(1)[0], priority=priority, timeout=timeout)
    return scoring_of(front, pairs, spec, body.truncation(front.engine.ready.context_length), common)


async def score_pairs(request: Request, driver: RequestDriver, body: ScoreBody) -> Response:
    """Answer `/v1/score`. use_activation false: a head's own scores, no probabilities."""
    front, pairs = driver.front, body.pairs()
    scoring = read_pairs(front, body, pairs)

    def answer(generation: AsyncGeneration) -> dict[str, Any]:
        scores = scoring.scores(generation.samples, front, raw=body.use_activation is False)
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
        return listing(generation, body, front, "score", data)

    rids = body.rids(len(scoring.jobs), several=len(scoring.jobs) > 1)
    return await respond(request, driver, scoring.jobs, rids, answer, _numbers(front, scoring))


async def rank_documents(request: Request, driver: RequestDriver, body: RerankBody) -> Response:
    """Answer `/v1/rerank`. Documents are told again unless `return_documents` is false."""
    front, texts, most = driver.front, body.texts, body.most
    scoring = read_pairs(front, body, body.pairs())

    def answer(generation: AsyncGeneration) -> dict[str, Any]:
        scores = scoring.scores(generation.samples, front, raw=body.use_activation is False)
        results = []
        for index in ranking(scores)[:most]:
            document = {} if body.return_documents is False else {"document": {"text": texts[index]}}
            results.append({"index": index, "relevance_score": scores[index]} | document)
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": front.config.model_name if body.model is None else body.model,
            "results": results,
            "usage": usage(generation.samples),
            "metadata": weight_metadata(generation.samples[0]),
        }

    rids = body.rids(len(scoring.jobs), several=len(scoring.jobs) > 1)
    return await respond(request, driver, scoring.jobs, rids, answer, _numbers(front, scoring))


def _numbers(front: RequestFront, scoring: Scoring) -> int:
    """About how many numbers are computed with: embeddings are compared here."""
    return len(scoring.jobs) * (1 if scoring.crossed else front.engine.ready.embedding.size)
