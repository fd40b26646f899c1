"""One response under way: from its submission to its one ending, as events and as the response object.

Whoever iterates `events` drives it; whole answers iterate too, and drop them. Owns the response's status. Knows
nothing of HTTP or of where responses are kept.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from multilora.drivers.async_generation import AsyncGeneration
from multilora.errors import MultiloraError, ResponseTooLarge
from multilora.front.generation import Sample
from multilora.front.stream import Delta, FinishReason
from multilora.front.tools.base import Content, Reasoning, SettledParts
from multilora.server.chat_job import ChatJob, logprob_entries
from multilora.server.errors import shortened
from multilora.server.response_bytes import ResponseBudget
from multilora.server.responses.event_log import EventLog, event_frame
from multilora.server.responses.output import OutputItems
from multilora.server.streaming import StreamEvent
from multilora.server.weight_versions import all_weights

logger = logging.getLogger(__name__)

RUNNING = "in_progress"


class ResponseRun:
    """head: the fields of the response that stay as they are. on_end: called once, when the response has ended."""

    def __init__(
        self, head: dict[str, Any], chat: ChatJob, generation: AsyncGeneration, on_end: Callable[[], None]
    ) -> None:
        self.error: MultiloraError | None = None
        self._head = head
        self._chat = chat
        self._generation = generation
        self._on_end = on_end
        self._status = RUNNING
        self._end: dict[str, Any] = {"completed_at": None, "error": None, "incomplete_details": None}
        self._parts = SettledParts()
        self._output = OutputItems()
        self._tokens = 0  # received, but of no part so far
        self._logprobs: list[dict[str, Any]] = []  # of these, unless they are the markup of thoughts or calls
        self._in_text = True  # the last part was text, or there was none
        self._reasoning_tokens = 0
        self._number = 0  # of the next event

    @property
    def running(self) -> bool:
        """Whether the response has not ended."""
        return self._status == RUNNING

    def response(self) -> dict[str, Any]:
        """The response object as it stands."""
        sample = self._generation.samples[0]
        usage = None if self.running else self._usage(sample)
        told = {"status": self._status, "output": self._output.items(), "usage": usage}
        return self._head | told | self._end | all_weights(sample)

    async def events(self) -> AsyncGenerator[StreamEvent, None]:
        """All events, in order and numbered. An error is the last one, and is kept as `error`."""
        async for event in self._events():
            yield self._numbered(event)

    async def finish(self) -> None:
        """Wait for the ending."""
        async for _ in self.events():
            pass

    async def record(self, log: EventLog, budget: ResponseBudget) -> None:
        """Wait for the ending, with every event in the log, as far as the budget goes."""
        try:
            async for event in self.events():
                log.append(budget.spend(event_frame(event)))
        except ResponseTooLarge as e:
            log.append(event_frame(self.end_with(e)))
        finally:
            log.end()

    def end_with(self, error: MultiloraError) -> StreamEvent:
        """The response fails here and now. Returns the last event of a stream that cannot go on to show it, in the
        place of the latest one, which was not sent."""
        self._generation.close()
        self._fail(error)
        self._number -= 1
        return self._numbered(
            {"type": "error", "code": error.kind, "message": shortened(error.message), "param": error.param}
        )

    def _numbered(self, event: StreamEvent) -> StreamEvent:
        self._number += 1
        return event | {"sequence_number": self._number - 1}

    def cancel(self) -> None:
        """End the response here and now, if it has not ended: what runs for it is aborted."""
        self._generation.close()
        if self.running:
            self._settle("cancelled")

    async def _events(self) -> AsyncGenerator[StreamEvent, None]:
        yield {"type": "response.created", "response": self.response()}
        yield {"type": "response.in_progress", "response": self.response()}
        try:
            async for sample, delta in self._generation.events():
                if not self.running:
                    break
                for event in self._take(sample, delta):
                    yield event
        except Exception as e:
            if not isinstance(e, MultiloraError):
                logger.exception("error inside a response")
                e = MultiloraError(f"internal error: {type(e).__name__}")
            self._fail(e)
        yield {"type": self._last_event(), "response": self.response()}

    def _take(self, sample: Sample, delta: Delta) -> Iterator[StreamEvent]:
        self._tokens += len(delta.token_ids)
        if sample.job.return_logprob:
            self._logprobs += logprob_entries(sample, delta)
        for part in self._parts.push(self._chat.events(sample, delta)):
            if not self.running:
                return  # cancelled while an event was being sent
            logprobs, self._logprobs = self._logprobs, []
            if isinstance(part, Reasoning):
                self._reasoning_tokens += self._tokens
            self._tokens = 0
            self._in_text = isinstance(part, Content)
            yield from self._output.push(part, logprobs if self._in_text else [])
        if not self._in_text:
            self._logprobs = []
        if delta.finished is not None and self.running:
            yield from self._finish(delta.finished)

    def _finish(self, finished: FinishReason) -> Iterator[StreamEvent]:
        yield from self._output.finish("completed" if finished.type == "stop" else "incomplete", self._logprobs)
        match finished.type:
            case "stop":
                self._end["completed_at"] = int(time.time())
                self._settle("completed")
            case "length":
                self._end["incomplete_details"] = {"reason": "max_output_tokens"}
                self._settle("incomplete")
            case _:
                self._settle("cancelled")

    def _fail(self, error: MultiloraError) -> None:
        if self.running:
            self.error = error
            self._end["error"] = {"code": "server_error", "message": shortened(error.message)}
            self._settle("failed")

    def _settle(self, status: str) -> None:
        for _ in self._output.close("incomplete"):  # nothing, unless the answer was broken off
            pass
        self._status = status
        self._on_end()

    def _last_event(self) -> str:
        """The Responses API has no event for a cancelled response; its status says so."""
        return f"response.{'incomplete' if self._status == 'cancelled' else self._status}"

    def _usage(self, sample: Sample) -> dict[str, Any]:
        read, written = len(sample.prompt_ids), sample.stream.completion_tokens
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": sample.stream.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": read + written,
        }
