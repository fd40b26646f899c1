"""One request under way: its samples, from the first check to their one ending each, without I/O.

Made by `RequestFront.submit`. The driver hands the engine's outputs to `Generation.receive` and calls
`Generation.close` at the end, always.
"""

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from multilora.engine.messages import Output
from multilora.errors import EngineRestarting, MultiloraError, from_wire
from multilora.front.access import Caller
from multilora.front.adapter_ref import Held
from multilora.front.adapter_spec import BASE, AdapterSpec
from multilora.front.admission import Ticket
from multilora.front.engine_link import RequestLink
from multilora.front.observer import FirstOutput, Observer, Origin, origin_of
from multilora.front.prompt import Prompt
from multilora.front.stream import Delta, FinishReason, TextStream
from multilora.front.versions import VersionHistory, VersionLabel, VersionSpan
from multilora.front.vocabulary import Vocabulary
from multilora.params import LogprobsMode, PoolingParams, SamplingParams
from multilora.tracing import TraceSpan, current_child


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt of a request; `sampling.n` says how many samples of it are wanted.

    Logprobs of the answer: `return_logprob`, with those of the `top_logprobs_num` best tokens and with ranks if
    `return_ranks`, in `logprobs_mode` (None: the server's). Logprobs of the prompt: from `logprob_start_len` on, if
    `return_logprob`; all of them, raw, with ranks and so many best tokens, by `prompt_logprobs`.
    kept_tokens: texts of special tokens that stay in the answer whatever `sampling.skip_special_tokens` says.
    pooling: the prompt is only read, and a row of numbers is made of it.
    salt: see `prompt.prefix_salt`. timeout: seconds until the request ends, whatever it has got.
    ids_param: the client's field that a prompt of token ids came in.
    """

    prompt: Prompt
    sampling: SamplingParams
    adapters: AdapterSpec = BASE
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    prompt_logprobs: int | None = None
    return_ranks: bool = False
    logprobs_mode: LogprobsMode | None = None
    pooling: PoolingParams | None = None
    salt: str = ""
    priority: int = 0
    timeout: float | None = None
    kept_tokens: tuple[str, ...] = ()
    ids_param: str = "input_ids"

    @property
    def param(self) -> str:
        """The client's field that the prompt came in."""
        return self.ids_param if isinstance(self.prompt, list | array) else self.prompt.param


@dataclass(eq=False)
class Sample:
    """One of the answers to a job. `stream` has all of its text and tokens so far. `index`: which of all its
    request's; `ticket`: what it was admitted with.
    """

    job: Job
    index: int
    ticket: Ticket
    vocabulary: Vocabulary
    stream: TextStream
    versions: VersionHistory
    prompt_ids: list[int] = field(default_factory=list)  # once it is tokenized
    seconds: float = 0.0  # from the request's start to the last delta
    first_seconds: float = 0.0  # from the request's start to the first output
    queue_seconds: float = 0.0
    started: bool = False  # its first output is here
    shown: bool = False  # the client has been told some of it
    origin: Origin = field(init=False)  # for the observer
    span: TraceSpan | None = field(init=False)  # None: it is not traced

    def __post_init__(self) -> None:
        self.span = current_child("llm_request")
        self.origin = origin_of(self.caller, self.job.adapters)

    @property
    def number(self) -> int:
        """Which of its job's samples it is."""
        return self.ticket.number

    @property
    def rid(self) -> str:
        """The client's word for it."""
        return self.ticket.rid

    @property
    def key(self) -> str:
        """The engine's word for it."""
        return self.ticket.key

    @property
    def held(self) -> Held:
        """What it runs on."""
        return self.ticket.held

    @property
    def caller(self) -> Caller:
        """Who has sent the request."""
        return self.ticket.caller

    @property
    def label(self) -> VersionLabel:
        """Which weights the last token so far comes from."""
        return self.versions.last(self.stream.completion_tokens)

    @property
    def version_spans(self) -> list[VersionSpan]:
        """Which weights the tokens so far come from."""
        return self.versions.spans(self.stream.completion_tokens)


class Generation:
    """The samples of one request: those of a job are neighbours, in the order of the jobs.

    on_end: called once for each sample, when it has ended.
    """

    def __init__(self, engine: RequestLink, observer: Observer, on_end: Callable[[Sample], None]):
        self.samples: list[Sample] = []
        self.created = time.time()
        self._engine = engine
        self._observer = observer
        self._on_end = on_end
        self._start = time.perf_counter()
        self._open: dict[str, Sample] = {}  # by key

    def add(self, sample: Sample) -> None:
        """The sample is open, and will be ended here."""
        self.samples.append(sample)
        self._open[sample.key] = sample

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return not self._open

    def receive_endless(self, output: Output) -> tuple[Sample, Delta] | None:
        """The same as `receive`, of an output that can neither end its sample nor begin it again, and that is shown
        to the client at once. None: it is not such a one, and has not been taken."""
        sample = self._open.get(output.rid)
        if sample is None or output.finished is not None or output.again or sample.stream.has_stops:
            return None
        sample.shown = True
        self._observe(sample, output)
        return sample, sample.stream.push_endless(output)

    def receive(self, output: Output) -> tuple[Sample, Delta] | None:
        """What an Output adds, to which sample; None: that one has ended already, or begins again.

        Raises the typed error that a sample ends with; the others are for `close` to abort.
        """
        sample = self._open.get(output.rid)
        if sample is None:
            return None
        if output.again:
            self._begin_again(sample)
            return None
        self._observe(sample, output)
        delta = sample.stream.push(output)
        if delta.drop:
            self._engine.finish(sample.key)
        if delta.finished is not None:
            self._finish(sample)
            if delta.finished.type == "error":
                raise self._error(sample, delta.finished)
        return sample, delta

    def _begin_again(self, sample: Sample) -> None:
        """The engine has ended and the next one computes the sample anew. Whoever has been told some of it cannot be
        told something else: raises EngineRestarting there."""
        if sample.shown:
            raise EngineRestarting("the engine ended in the middle of this answer and is started again; try again")
        sample.stream = sample.stream.renewed()

    def _observe(self, sample: Sample, output: Output) -> None:
        now = time.perf_counter() - self._start
        if output.drafted:
            self._observer.verified(sample.origin, output.drafted, output.accepted)
        if sample.started:
            if output.token_ids:
                self._observer.next_output(sample.origin, len(output.token_ids), now - sample.seconds)
        elif output.token_ids or output.finished is None or output.finished.type not in ("abort", "error"):
            self._observe_first(sample, output, now)  # what failed before it ran has no first output
        sample.seconds = now

    def _observe_first(self, sample: Sample, output: Output, now: float) -> None:
        sample.started = True
        sample.first_seconds, sample.queue_seconds = now, output.queue_seconds
        first = FirstOutput(
            seconds=now,
            queue_seconds=output.queue_seconds,
            prompt_tokens=len(sample.prompt_ids),
            cached_tokens=output.cached_tokens,
            generated=len(output.token_ids),
        )
        self._observer.first_output(sample.origin, first)

    def close(self) -> None:
        """Abort what has not ended, and release its adapters. Idempotent."""
        for sample in list(self._open.values()):
            if sample.ticket.submitted:
                self._engine.abort(sample.key)
            self._finish(sample)

    def _finish(self, sample: Sample) -> None:
        del self._open[sample.key]
        self._on_end(sample)

    def _error(self, sample: Sample, reason: FinishReason) -> MultiloraError:
        where = f"item {sample.index} of the batch: " if len(self.samples) > 1 else ""
        return from_wire(reason.kind, where + reason.message)
