"""The one road from a checked body to tokens, used by every route that generates.

A `Flight` is one HTTP request on its way: one or more sequences, each with its adapters held from before it is
submitted until its one ending (stop, length, abort or error). `Front.start` checks everything at the door before
anything is submitted; `Flight.events` yields what is new; `Flight.close` aborts what has not ended, always.
Knows no wire format. Called by `native.py`, `completions.py` and `chat.py`.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from multilora.config import Config
from multilora.engine.messages import Output, Submit
from multilora.errors import BadRequest, EngineDead, MultiloraError, QueueFull, from_wire
from multilora.front.adapter_spec import BASE, AdapterSpec
from multilora.front.prompt import check_prompt, engine_params
from multilora.front.registry import AdapterRegistry, Held
from multilora.front.stream import Delta, FinishReason, TextStream
from multilora.front.vocabulary import Vocabularies, Vocabulary
from multilora.params import SamplingParams
from multilora.server.client import Client
from multilora.server.metrics import Metrics

if TYPE_CHECKING:
    from multilora.front.grammar import GrammarCompiler


@dataclass(frozen=True, kw_only=True)
class Job:
    """One sequence to generate. `vocabulary`: whose tokens `prompt_ids` are if they were text, None: ids were given.
    `sample`: which of the `n` answers to the same prompt."""

    prompt_ids: list[int]
    sampling: SamplingParams
    adapters: AdapterSpec = BASE
    vocabulary: Vocabulary | None = None
    sample: int = 0
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0


@dataclass
class Sequence:
    """One sequence in flight. `stream` has all of its text and tokens so far. `rid` is the client's word for it and
    may come again later; `key` is the engine's and never does, so no late Output can reach another request."""

    rid: str
    key: str
    job: Job
    stream: TextStream
    held: Held
    vocabulary: Vocabulary
    queue: "asyncio.Queue[Output]" = field(default_factory=asyncio.Queue)
    seconds: float = 0.0  # from start to the last delta
    queue_seconds: float = 0.0
    submitted: bool = False
    abort_message: str | None = None  # aborted before it was submitted
    started: bool = False  # its first output is here
    open: bool = True  # holds its adapters


class Flight:
    """The sequences of one HTTP request. Iterate `events()`, then `close()`; both only once needed."""

    def __init__(self, front: "Front", sequences: list[Sequence]):
        self.sequences = sequences
        self.created = time.time()
        self._front = front
        self._start = time.perf_counter()

    async def events(self) -> AsyncIterator[tuple[int, Delta]]:
        """(index of the sequence, what is new), until each has ended. Raises the typed error of the first that
        fails; the others are aborted then."""
        try:
            async for index, output in self._outputs():
                yield index, self._push(index, output)
        finally:
            self.close()

    async def results(self) -> list[Sequence]:
        """Wait for all endings."""
        async for _ in self.events():
            pass
        return self.sequences

    def close(self) -> None:
        """Abort and release what has not ended. Idempotent."""
        for sequence in self.sequences:
            if sequence.open:
                if sequence.submitted:
                    self._front.client.abort(sequence.key)
                self._front.land(sequence)

    async def _outputs(self) -> AsyncIterator[tuple[int, Output]]:
        if len(self.sequences) == 1:
            while self.sequences[0].open:
                yield 0, await self.sequences[0].queue.get()
            return
        merged: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

        async def pump(index: int, queue: "asyncio.Queue[Output]") -> None:
            while True:
                merged.put_nowait((index, await queue.get()))

        pumps = [asyncio.create_task(pump(i, s.queue)) for i, s in enumerate(self.sequences)]
        try:
            while any(s.open for s in self.sequences):
                index, output = await merged.get()
                if self.sequences[index].open:
                    yield index, output
        finally:
            for task in pumps:
                task.cancel()

    def _push(self, index: int, output: Output) -> Delta:
        sequence, metrics = self.sequences[index], self._front.metrics
        sequence.seconds = time.perf_counter() - self._start
        if not sequence.started:
            sequence.started = True
            sequence.queue_seconds = output.queue_seconds
            metrics.first_output(sequence.job.adapters, sequence.seconds, output.queue_seconds)
        delta = sequence.stream.push(output)
        if delta.drop:
            self._front.client.finish(sequence.key)
        if delta.finished is not None:
            self._front.land(sequence)
            if delta.finished.type == "error":
                raise self._error(index, delta.finished)
        return delta

    def _error(self, index: int, reason: FinishReason) -> MultiloraError:
        where = f"item {index} of the batch: " if len(self.sequences) > 1 else ""
        return from_wire(reason.kind, where + reason.message)


class Front:
    """What all generating routes share: the engine's client, the tokenizers, the names, the flights in the air."""

    def __init__(
        self,
        config: Config,
        client: Client,
        vocabularies: Vocabularies,
        registry: AdapterRegistry,
        metrics: Metrics,
        sampling_defaults: dict[str, Any] | None = None,
    ):
        self.config = config
        self.client = client
        self.vocabularies = vocabularies
        self.registry = registry
        self.metrics = metrics
        self.sampling_defaults = dict(sampling_defaults or {}) if config.sampling_defaults == "model" else {}
        self._open: dict[str, Sequence] = {}
        self._serial = itertools.count()
        self._grammars: GrammarCompiler | None = None
        self._tokenizer_info: str | None = None  # for the engine, once there are grammars and until it is sent
        self._compiling = ThreadPoolExecutor(1, "grammar")

    # grammars

    async def _with_grammars(self, submits: list[Submit], jobs: list[Job]) -> list[Submit]:
        """Add the compiled grammars: each distinct one compiled once, off the event loop."""
        done: dict[tuple[str | None, ...], str | None] = {(None, None, None): None}
        result = []
        for submit, job in zip(submits, jobs, strict=True):
            key = (job.sampling.json_schema, job.sampling.regex, job.sampling.ebnf)
            if key not in done:
                loop = asyncio.get_running_loop()
                done[key] = await loop.run_in_executor(self._compiling, self._compile, job.sampling)
                if self._tokenizer_info is not None:
                    self.client.use_tokenizer(self._tokenizer_info)
                    self._tokenizer_info = None
            result.append(msgspec.structs.replace(submit, grammar=done[key]))
        return result

    def _compile(self, sampling: SamplingParams) -> str | None:
        if self._grammars is None:
            from multilora.front.grammar import GrammarCompiler  # heavy, and most servers never need it

            ready = self.client.ready
            tokenizer = self.vocabularies.base.reader("a grammar")
            self._grammars = GrammarCompiler(tokenizer, ready.vocab_size, ready.eos_token_ids)
            self._tokenizer_info = self._grammars.tokenizer_info_json()
        return self._grammars.compile(sampling)

    # requests

    async def start(self, jobs: list[Job], rids: list[str] | None = None) -> Flight:
        """Check all jobs at the door, then submit them. `rids`: one per job; None: new ones.
        On any error nothing goes on and no adapter is held."""
        self._check_room(len(jobs))
        rids = rids or [uuid.uuid4().hex for _ in jobs]
        if len(set(rids)) < len(rids) or any(not rid or rid in self._open for rid in rids):
            raise BadRequest("rid: each must be unique, not empty and not in use", param="rid")
        self.registry.check_request(job.adapters for job in jobs)
        flight = Flight(self, [])
        try:
            submits = [self._board(flight, job, rid) for job, rid in zip(jobs, rids, strict=True)]
            submits = await self._with_grammars(submits, jobs)
            for sequence, submit in zip(flight.sequences, submits, strict=True):
                sequence.queue = self.client.submit(submit)
                sequence.submitted = True
                self.metrics.submitted(sequence.job.adapters)
                if sequence.abort_message is not None:
                    self.client.abort(sequence.key, sequence.abort_message)
        except BaseException:
            flight.close()
            raise
        return flight

    def land(self, sequence: Sequence) -> None:
        """The sequence has ended: give its adapter back. Once per sequence."""
        assert sequence.open
        sequence.open = False
        del self._open[sequence.rid]
        if sequence.submitted:
            reason = sequence.stream.finished.type if sequence.stream.finished else "abort"
            tokens = (len(sequence.job.prompt_ids), sequence.stream.completion_tokens)
            self.metrics.ended(sequence.job.adapters, *tokens, reason)
        self.registry.release(sequence.held)

    def abort(self, rid: str | None, message: str) -> None:
        """Abort the request `rid`, all of its sequences; None: every request. They end with `abort`."""
        for open_rid, sequence in list(self._open.items()):
            if rid is None or open_rid == rid or open_rid.rpartition("#")[0] == rid:
                sequence.abort_message = message
                if sequence.submitted:
                    self.client.abort(sequence.key, message)

    def _check_room(self, count: int) -> None:
        if not self.client.alive:
            raise EngineDead("the engine process ended; restart the server")
        room = self.config.max_running_requests + self.config.max_queued_requests
        if count > room:
            raise BadRequest(f"{count} sequences in one request; the queue holds {room}")
        if len(self._open) + count > room:
            raise QueueFull(f"the queue is full: {len(self._open)} requests run or wait; try again later")

    def _board(self, flight: Flight, job: Job, rid: str) -> Submit:
        ready, sampling, length = self.client.ready, job.sampling, len(job.prompt_ids)
        vocabulary = self.vocabularies.of(job.adapters)
        if job.vocabulary not in (None, vocabulary):
            raise BadRequest("the adapter was replaced while its prompt was tokenized: send the request again")
        check_prompt(job.prompt_ids, ready.context_length, vocabulary.size)
        limits = (length, ready.context_length, vocabulary.size)
        params = engine_params(sampling, *limits, sample=job.sample, ends=vocabulary.ends)
        vocabulary.check_grammar(sampling)
        if not -1 <= job.logprob_start_len <= length:
            raise BadRequest(
                f"logprob_start_len = {job.logprob_start_len}: the prompt has {length} tokens",
                param="logprob_start_len",
            )
        if not 0 <= job.top_logprobs_num <= vocabulary.size:
            raise BadRequest(
                f"top_logprobs_num = {job.top_logprobs_num}: must be 0 to {vocabulary.size}",
                param="top_logprobs_num",
            )
        if sampling.stop_strings or sampling.stop_regexes:
            vocabulary.reader("a stop string", "stop")
        stream = TextStream(vocabulary.tokenizer, sampling, job.prompt_ids, ready.eos_token_ids)
        key = f"{rid}@{next(self._serial)}"
        sequence = Sequence(rid, key, job, stream, self.registry.acquire(job.adapters), vocabulary)
        self._open[rid] = sequence
        flight.sequences.append(sequence)
        return Submit(
            rid=key,
            input_ids=job.prompt_ids,
            sampling=params,
            adapters=sequence.held.composition,
            return_logprob=job.return_logprob,
            logprob_start_len=job.logprob_start_len if job.return_logprob else -1,
            top_logprobs_num=job.top_logprobs_num if job.return_logprob else 0,
        )
