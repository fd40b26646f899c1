"""`POST /v1/messages` and `/v1/messages/count_tokens`. Called by `server/app.py`."""

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.request_driver import RequestDriver
from multilora.errors import MultiloraError
from multilora.front.effects import Lane
from multilora.front.prompt import ChatPrompt
from multilora.server.anthropic.answer import MessageAnswer
from multilora.server.anthropic.body import WORDS, CountBody, MessagesBody
from multilora.server.anthropic.errors import anthropic_error
from multilora.server.chat_job import ChatJob
from multilora.server.constraints import in_the_clients_field
from multilora.server.dialects import in_words_of
from multilora.server.resolving import resolved
from multilora.server.response_bytes import ResponseBudget
from multilora.server.streaming import EventStream, Json, close, named_frame, while_connected
from multilora.server.strict_route import StrictRoute
from multilora.server.tokenization import UNBOUNDED


def router(driver: RequestDriver, sampling_defaults: dict[str, Any]) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)

    @routes.post("/v1/messages")
    async def messages(request: Request, body: MessagesBody) -> Response:
        """Answer messages, in one piece or as a stream."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            return await _respond(request, body, driver, sampling_defaults)

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request, body: CountBody) -> Response:
        """The number of tokens of a prompt."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            with in_words_of(WORDS):
                job = ChatJob(driver.front, body.chat_body(), {}).job
                assert isinstance(job.prompt, ChatPrompt)
                vocabulary = driver.front.vocabularies.of(job.adapters)
                ids = await driver.run_blocking(Lane.LONG_TEXT, partial(job.prompt.encode, vocabulary, UNBOUNDED))
        return Json({"input_tokens": len(ids)})

    return routes


async def _respond(
    request: Request, body: MessagesBody, driver: RequestDriver, sampling_defaults: dict[str, Any]
) -> Response:
    with in_words_of(WORDS):
        chat_body = body.chat_body()
        chat = ChatJob(driver.front, chat_body, sampling_defaults)
    model = driver.front.config.model_name if body.model is None else body.model
    budget = ResponseBudget(driver.front.config.max_response_bytes)

    async def begin() -> MessageAnswer:
        with in_words_of(WORDS), in_the_clients_field(chat_body.constraint()):
            generation = await driver.generate([chat.job], None, budget.limit)
        return MessageAnswer(chat, generation, model, body.max_tokens)

    async def whole() -> dict[str, Any]:
        answer = await begin()
        async for _ in answer.events():
            pass
        return answer.message()

    if not body.stream:
        return budget.whole(Json(await while_connected(request.receive, whole())))
    answer = await while_connected(request.receive, begin(), close)
    frames = _frames(answer)
    return await EventStream.begin(request.receive, frames, answer.close, budget, error_frame=_error_frame, done=b"")


async def _frames(answer: MessageAnswer) -> AsyncGenerator[bytes, None]:
    async for event in answer.events():
        yield named_frame(event["type"], event)


def _error_frame(error: MultiloraError) -> bytes:
    return named_frame("error", anthropic_error(error))
