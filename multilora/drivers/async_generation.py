"""One generation under way, for tasks of an event loop: its events as they come, several at a time to who is slow.

Made by `AsyncDriver.generate`. Whoever can take an event without waiting may have it on the spot (`divert`): for a
server with thousands of streams, waking a task for each token is most of the work.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from multilora.drivers.mailbox import LoopTurns, Mailbox
from multilora.engine.messages import Output
from multilora.errors import MultiloraError, ResponseTooLarge
from multilora.front.answer_size import AnswerSize
from multilora.front.generation import Generation, Sample
from multilora.front.stream import Delta

logger = logging.getLogger(__name__)

MERGED_FROM = 64
"""Events of one request that wait: from so many on there is one for each sample."""

SampleEvent = tuple[Sample, Delta]


class AsyncGeneration:
    """A Generation under way. Iterate `events`, or call `take`, or await `results`; all close it at the end.

    most_bytes: raises ResponseTooLarge once its answer has more of them, counted as `AnswerSize` does; None: never.
    """

    def __init__(
        self, generation: Generation, outputs: Mailbox[Output], turns: LoopTurns, most_bytes: int | None = None
    ):
        self.samples = generation.samples
        self.created = generation.created
        self.close = generation.close
        self._generation = generation
        self._outputs = outputs
        self._turns = turns
        self._most_bytes = most_bytes
        self._size = AnswerSize()
        self._error: MultiloraError | None = None  # to be raised once what came before it is taken

    async def events(self) -> AsyncIterator[SampleEvent]:
        """What is new, of which sample, until each has ended. Raises the typed error of the first that fails.

        Who reads slowly gets more at a time: what has come meanwhile is one delta.
        """
        try:
            while (taken := await self.take()) is not None:
                for event in taken:
                    yield event
        finally:
            self.close()

    async def take(self) -> Iterable[SampleEvent] | None:
        """What has come since the last call, or None once every sample has ended. Raises as `events` does. Others
        run before it returns. A sample is as its event says only until the next event is asked for."""
        try:
            if self._error is not None:
                raise self._error
            if self._generation.finished:
                return None
            outputs = await self._outputs.take()
        except BaseException:
            self.close()
            raise
        return self._shown(outputs) if len(outputs) < MERGED_FROM else self._merged(outputs)

    def _received(self, outputs: Iterable[Output]) -> Iterator[tuple[Output, SampleEvent | None]]:
        """What each of them adds, up to the first error."""
        try:
            for output in outputs if self._error is None else ():
                event = self._generation.receive(output)
                self._count(output, event)
                yield output, event
        except MultiloraError as e:
            self._error = e

    def _count(self, output: Output, event: SampleEvent | None) -> None:
        if self._most_bytes is None:
            return
        if output.again:
            self._size.begin_again(output)
        elif event is not None:
            self._size.add(output, event[1])
            if self._size.total > self._most_bytes:
                raise ResponseTooLarge.over(self._most_bytes)

    def _shown(self, outputs: Iterable[Output]) -> Iterator[SampleEvent]:
        for _, event in self._received(outputs):
            if event is not None:
                event[0].shown = True
                yield event

    def _merged(self, outputs: Iterable[Output]) -> list[SampleEvent]:
        """One event for each sample. What comes before a sample begins again is void."""
        events: dict[str, SampleEvent] = {}  # by the sample's key
        for output, event in self._received(outputs):
            if output.again:
                events.pop(output.rid, None)
            elif event is not None:
                sample, delta = event
                before = events.get(output.rid)
                events[output.rid] = (sample, delta if before is None else before[1].then(delta))
        for sample, _ in events.values():
            sample.shown = True
        return list(events.values())

    async def results(self) -> list[Sample]:
        """Wait for all endings. Nobody sees anything before: what the engine has to begin again is begun again."""
        try:
            while not self._generation.finished and self._error is None:
                for _ in self._received(await self._outputs.take()):
                    pass
            if self._error is not None:
                raise self._error
        finally:
            self.close()
        return self.samples

    def divert(self, ready: Callable[[], bool], receive: Callable[[Sample, Delta], None]) -> None:
        """From now on give `receive` an event at once, from within the engine's message, whenever the reader waits
        in `take` and `ready` says that there is room. What may end a sample still comes by `take`, and so does what
        comes faster than the event loop turns."""
        generation, turns = self._generation, self._turns
        last = -1

        def direct(output: Output) -> bool:
            nonlocal last
            now = turns.now
            if now == last or not ready():
                return False
            try:
                event = generation.receive_endless(output)
                if event is None:
                    return False
                last = now
                receive(*event)
            except MultiloraError as e:
                self._error = e
                return False
            except Exception as e:  # it must not reach the engine's other streams
                logger.exception("error inside a stream")
                self._error = MultiloraError(f"internal error: {type(e).__name__}")
                return False
            return True

        self._outputs.direct = direct
