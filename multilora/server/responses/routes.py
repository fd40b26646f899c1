"""`/v1/responses`: create, read, follow, cancel and delete a response, and list what it answers.

A whole answer and a stream are aborted when their client hangs up; a background response runs until it ends or is
cancelled, whoever reads its stream. Called by `server/app.py`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response

from multilora.drivers.async_driver import AsyncDriver
from multilora.errors import BadRequest, MultiloraError, PreviousResponseNotFound, UnknownResponse
from multilora.params import SamplingParams
from multilora.server.chat_job import ChatJob
from multilora.server.constraints import in_the_clients_field
from multilora.server.dialects import in_words_of, refused
from multilora.server.resolving import resolved
from multilora.server.response_bytes import ResponseBudget
from multilora.server.responses.body import WORDS, ResponsesBody
from multilora.server.responses.event_log import EventLog, event_frame
from multilora.server.responses.item_pages import page, with_id
from multilora.server.responses.items import ItemMessages, input_items
from multilora.server.responses.output import new_id
from multilora.server.responses.run import ResponseRun
from multilora.server.responses.store import ResponseStore, StoredResponse, json_bytes, own_key
from multilora.server.streaming import EventStream, Json, while_connected
from multilora.server.strict_route import StrictRoute

NOTHING = StoredResponse(None, [], 0)
"""What stands before a conversation's first response."""


def router(driver: AsyncDriver, sampling_defaults: dict[str, Any]) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute)
    responses = Responses(driver, sampling_defaults)
    store = responses.store

    @routes.post("/v1/responses")
    async def create(request: Request, body: ResponsesBody) -> Response:
        """Answer input items, in one piece, as a stream, or in the background."""
        async with resolved(request.receive, driver, body.model, body.lora_path):
            return await responses.create(request, body)

    @routes.get("/v1/responses/{response_id}")
    async def read(
        request: Request, response_id: str, *, stream: bool = False, starting_after: int | None = None
    ) -> Response:
        """A stored response as it stands or, if it was begun as a stream in the background, its events behind the
        one with the number `starting_after`."""
        stored = store.get(response_id)
        if stream:
            return await responses.follow(request, stored.log, -1 if starting_after is None else starting_after)
        if starting_after is not None:
            raise BadRequest("starting_after: only with stream=true", param="starting_after")
        return Json(stored.response())

    @routes.get("/v1/responses/{response_id}/input_items")
    async def input_items_of(
        response_id: str, after: str | None = None, limit: int | None = None, order: str | None = None
    ) -> Response:
        """What a stored response answers, the conversation before it included, page by page."""
        return Json(page(store.get(response_id).input_items, after, limit, order))

    @routes.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        """Abort a response that runs; one that has ended stays as it is."""
        stored = store.get(response_id)
        if stored.run is not None:
            stored.run.cancel()
        return Json(stored.response())

    @routes.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        """Forget a response; one that runs is aborted."""
        stored = store.get(response_id)
        store.discard(response_id)
        if stored.run is not None:
            stored.run.cancel()
        return Json({"id": response_id, "object": "response", "deleted": True})

    return routes


class Responses:
    """Starts responses and keeps them."""

    def __init__(self, driver: AsyncDriver, sampling_defaults: dict[str, Any]):
        self.store = ResponseStore()
        self._driver = driver
        self._defaults = sampling_defaults
        self._background: set[asyncio.Task[None]] = set()

    async def create(self, request: Request, body: ResponsesBody) -> Response:
        """Start the response that `body` asks for, and answer as it wants it. Raises the typed errors."""
        body.check()
        response_id = new_id("resp")
        budget = self._budget()
        if not body.stream and not body.background:
            return budget.whole(Json(await while_connected(request.receive, self._whole(response_id, body))))
        log = EventLog() if body.stream and body.background else None

        def forget(run: ResponseRun) -> None:  # the client is gone, and has not been told the id
            self.store.discard(response_id)
            run.cancel()

        run = await while_connected(request.receive, self._start(response_id, body, log), forget)
        if log is not None:
            self._go_on(run.record(log, budget))
            return await self.follow(request, log)
        if body.background:
            self._go_on(run.finish())
            return Json(run.response())

        def last_frame(error: MultiloraError) -> bytes:
            return event_frame(run.end_with(error))

        return await EventStream.begin(
            request.receive, _frames(run), run.cancel, budget, error_frame=last_frame, done=b""
        )

    async def follow(self, request: Request, log: EventLog | None, last: int = -1) -> Response:
        """A stream of the events behind number `last`. Raises BadRequest."""
        if log is None:
            message = "stream: only a response that was created with background and stream can be streamed again"
            raise BadRequest(message, param="stream")
        if last != -1 and not 0 <= last < len(log):
            message = f"starting_after: {last}: the response has {len(log)} events so far, from 0 on"
            raise BadRequest(message, param="starting_after")
        if log.ended and last == len(log) - 1:
            return Response(media_type=EventStream.media_type)
        budget = self._budget()  # of a request of its own
        return await EventStream.begin(request.receive, log.frames(last + 1), lambda: None, budget, done=b"")

    def _budget(self) -> ResponseBudget:
        return ResponseBudget(self._driver.front.config.max_response_bytes)

    async def _whole(self, response_id: str, body: ResponsesBody) -> dict[str, Any]:
        run = await self._start(response_id, body)
        try:
            await run.finish()
            if run.error is not None:
                raise run.error
        except BaseException:  # the client, which has not been told the id, is gone or gets an error
            self.store.discard(response_id)
            raise
        finally:
            run.cancel()
        return run.response()

    async def _start(self, response_id: str, body: ResponsesBody, log: EventLog | None = None) -> ResponseRun:
        previous = self._previous(body.previous_response_id)
        items = [with_id(self._resolved(item, f"input[{i}]")) for i, item in enumerate(input_items(body.input))]
        conversation = ItemMessages()
        for item in previous.items:
            conversation.add(item, "previous_response_id")
        for i, item in enumerate(items):
            conversation.add(item, f"input[{i}]")
        if not conversation.messages and body.instructions is None:
            raise BadRequest("input: no items, and no instructions", param="input")
        with in_words_of(WORDS):
            chat_body = body.chat_body(conversation.messages)
        with in_words_of(WORDS), in_the_clients_field(chat_body.constraint()):
            chat = ChatJob(self._driver.front, chat_body, self._defaults, "input")
            generation = await self._driver.generate([chat.job], [response_id], self._budget().limit)
        head = _head(response_id, body, chat.job.sampling, self._driver.front.config.model_name)
        key = own_key(response_id)
        run = ResponseRun(head, chat, generation, lambda: self.store.settle(key))
        if body.store is not False:
            self.store.add(response_id, run, [*previous.items, *items], previous.nbytes + json_bytes(items), log)
        return run

    def _previous(self, response_id: str | None) -> StoredResponse:
        """The response that comes before in the conversation."""
        if response_id is None:
            return NOTHING
        param = "previous_response_id"
        try:
            stored = self.store.get(response_id)
        except UnknownResponse:
            message = f"Previous response with id {response_id!r:.100} not found."
            raise PreviousResponseNotFound(message, param=param) from None
        if stored.run is not None:
            raise BadRequest(f"{param}: response {response_id!r} has not ended", param=param)
        return stored

    def _resolved(self, item: Any, path: str) -> Any:
        """The item itself, where `item` only refers to it."""
        if not isinstance(item, dict) or item.get("type") != "item_reference":
            return item
        found = self.store.item(item.get("id"))
        if found is None:
            raise refused(f"{path}.id", f"item {item.get('id')!r:.100} is not stored, or not any more")
        return found

    def _go_on(self, work: Coroutine[Any, Any, None]) -> None:
        """Carry the work through, whether its client stays or not."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _frames(run: ResponseRun) -> AsyncGenerator[bytes, None]:
    async for event in run.events():
        yield event_frame(event)


def _head(response_id: str, body: ResponsesBody, sampling: SamplingParams, model_name: str) -> dict[str, Any]:
    """The fields of the response object that stay as they are, from the first event to the last."""
    given = body.model_dump(exclude_none=True, by_alias=True)
    reasoning = body.reasoning
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model_name if body.model is None else body.model,
        "background": bool(body.background),
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "store": body.store is not False,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}} | given.get("text", {}),
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": given.get("tools", []),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
    }
