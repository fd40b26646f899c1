"""The one road from a client's request to the engine, whichever door it came through, without I/O.

`RequestFront.submit` checks everything before anything is sent. Each sample has its ticket (`admission.py`), and so
its adapters, from before its prompt is tokenized until its one ending (stop, length, abort or error). `front.py` adds
what there is once per server.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from multilora.config import Config
from multilora.engine.messages import Output, Submit
from multilora.errors import MultiloraError
from multilora.front.access import CALLER
from multilora.front.adapter_ref import Held
from multilora.front.admission import SampleAdmission, Ticket, Wanted
from multilora.front.classification import check_head, classified_tokens
from multilora.front.effects import Lane, RunBlocking, Steps
from multilora.front.engine_link import RequestLink
from multilora.front.generation import Generation, Job, Sample
from multilora.front.grammar import Grammars
from multilora.front.observer import Ending, Observer, origin_of
from multilora.front.prompt import (
    ChatPrompt,
    PairPrompt,
    TextPrompt,
    check_logprobs,
    check_prompt,
    check_stops,
    deadline,
    encode,
    engine_params,
    tenant_salt,
)
from multilora.front.registry import AdapterRegistry
from multilora.front.request_span import end_span
from multilora.front.stream import TextStream
from multilora.front.tenants import tenant_of
from multilora.front.versions import VersionHistory
from multilora.front.vocabulary import Vocabularies, Vocabulary
from multilora.params import LOGPROBS_MODES

INLINE_CHARS = 2048
"""Texts of one request that are tokenized at once, 1 ms; more goes to a thread, which costs 0.15 ms."""
LONG_CHARS = 256 << 10
"""More than these do not keep shorter ones waiting, 0.2 s."""


class AdapterHolder(Protocol):
    """What loads adapters that are asked for and not loaded; see `Resolver`. active: whether there is any need to ask
    it."""

    @property
    def active(self) -> bool: ...

    def hold(self, names: Iterable[str]) -> Steps[Sequence[Held]]: ...

    def release(self, held: Sequence[Held]) -> None: ...


class RequestFront:
    """What requests need: the engine, the names, the vocabularies and the grammars that they share, who admits them
    and who counts them."""

    def __init__(
        self,
        config: Config,
        engine: RequestLink,
        registry: AdapterRegistry,
        vocabularies: Vocabularies,
        admission: SampleAdmission,
        resolver: AdapterHolder,
        observer: Observer,
    ):
        self.config = config
        self.engine = engine
        self.registry = registry
        self.vocabularies = vocabularies
        self.admission = admission
        self.resolver = resolver
        self.observer = observer
        self._grammars = Grammars(vocabularies.base, engine)

    def submit(
        self, jobs: Sequence[Job], deliver: Callable[[Output], None], rids: Sequence[str] | None = None
    ) -> Steps[Generation]:
        """Check all jobs, then send all their samples; `deliver` gets their outputs. `rids`: one for each sample.

        On any error nothing is sent and no adapter is held.
        """
        try:
            return (yield from self._submit(jobs, deliver, rids))
        except MultiloraError as e:
            for job in jobs:
                self.observer.refused(origin_of(CALLER.get(), job.adapters), e.kind)
            raise

    def _submit(
        self, jobs: Sequence[Job], deliver: Callable[[Output], None], rids: Sequence[str] | None
    ) -> Steps[Generation]:
        wanted = [Wanted(job.adapters, job.sampling.n, job.priority) for job in jobs]
        tickets = yield from self.admission.open(wanted, rids)
        generation = Generation(self.engine, self.observer, self._end)
        groups = self._add_samples(generation, jobs, tickets)
        try:
            prompts = yield from self._tokenize([samples[0] for samples in groups])
            for samples, ids in zip(groups, prompts, strict=True):
                for sample in samples:
                    sample.prompt_ids = ids
            messages = {sample.key: self._prepare(sample) for sample in generation.samples}
            grammars = yield from self._grammars.compile([job.sampling for job in jobs])
            for samples, grammar in zip(groups, grammars, strict=True):
                for sample in samples:
                    message = messages[sample.key]
                    self._send(sample, msgspec.structs.replace(message, grammar=grammar), deliver)
        except BaseException:
            generation.close()
            raise
        return generation

    def _end(self, sample: Sample) -> None:
        """The sample has ended: its adapters are free again."""
        self.admission.end(sample.ticket)
        if sample.ticket.submitted or sample.span is not None:
            ending = _ending(sample, self.engine.ready.context_length)
        if sample.span is not None:
            end_span(sample.span, sample, ending, self.config.model_name)
        if sample.ticket.submitted:
            self.observer.ended(sample.origin, ending)

    # ------------------------------------------------------------------ the steps of `submit`

    def _add_samples(
        self, generation: Generation, jobs: Sequence[Job], tickets: Sequence[Sequence[Ticket]]
    ) -> list[list[Sample]]:
        """On an error no ticket stays open."""
        groups: list[list[Sample]] = []
        unused = list(itertools.chain(*tickets))
        try:
            for job, found in zip(jobs, tickets, strict=True):
                vocabulary = self._vocabulary(job, found[0])
                groups.append([])
                for ticket in found:
                    groups[-1].append(self._sample(job, ticket, len(generation.samples), vocabulary))
                    generation.add(groups[-1][-1])
                    unused.remove(ticket)
        except BaseException:
            generation.close()
            for ticket in unused:
                self.admission.end(ticket)
            raise
        return groups

    def _vocabulary(self, job: Job, ticket: Ticket) -> Vocabulary:
        vocabulary = self.vocabularies.of_version(ticket.sole_version)
        vocabulary.check_grammar(job.sampling)
        check_stops(job.sampling, self.config.max_stop_strings)
        if job.sampling.stop_strings or job.sampling.stop_regexes:
            vocabulary.reader("a stop string", "stop")
        return vocabulary

    def _sample(self, job: Job, ticket: Ticket, index: int, vocabulary: Vocabulary) -> Sample:
        stream = TextStream(vocabulary.tokenizer, job.sampling, self.engine.ready.eos_token_ids, job.kept_tokens)
        return Sample(job, index, ticket, vocabulary, stream, VersionHistory(ticket.held.label))

    def _tokenize(self, samples: Sequence[Sample]) -> Steps[list[list[int]]]:
        """The token ids of each one's prompt. Chat templates may do anything, so they always get a thread."""
        context_length = self.engine.ready.context_length
        prompts = [sample.job.prompt for sample in samples]
        size = sum(prompt.size for prompt in prompts if isinstance(prompt, TextPrompt | PairPrompt))
        if any(isinstance(prompt, ChatPrompt) for prompt in prompts) or size > INLINE_CHARS:
            lane = Lane.TEXT if size <= LONG_CHARS else Lane.LONG_TEXT
            return (yield from RunBlocking(lane, partial(_encode, samples, context_length)))
        return _encode(samples, context_length)

    def _prepare(self, sample: Sample) -> Submit:
        """The checks of what depends on the prompt's tokens, and the message but for its grammar."""
        job = sample.job
        check_head(job, sample.held, self.engine.ready)
        if job.pooling is not None and job.pooling.scores:
            sample.prompt_ids = classified_tokens(sample.prompt_ids, self.engine.ready.pad_token_id)
        length = len(sample.prompt_ids)
        context, vocab_size = self.engine.ready.context_length, sample.vocabulary.size
        check_prompt(sample.prompt_ids, context, vocab_size, job.param, answered=job.pooling is None)
        most = min(self.config.max_logprobs, vocab_size)
        check_logprobs(job.logprob_start_len, job.top_logprobs_num, length, most, job.prompt_logprobs)
        ends, number = sample.vocabulary.ends, sample.number
        return Submit(
            rid=sample.key,
            input_ids=sample.prompt_ids,
            sampling=engine_params(job.sampling, length, context, vocab_size, sample=number, ends=ends),
            adapters=sample.held.composition,
            return_logprob=job.return_logprob,
            logprob_start_len=job.logprob_start_len if job.return_logprob else -1,
            top_logprobs_num=job.top_logprobs_num if job.return_logprob else 0,
            prompt_logprobs=job.prompt_logprobs,
            return_ranks=job.return_logprob and job.return_ranks,
            logprobs_mode=job.logprobs_mode or LOGPROBS_MODES[self.config.logprobs_mode],
            pooling=job.pooling,
            salt=tenant_salt(sample.caller.tenant.name, job.salt),
            tenant=tenant_of(self.config, sample.caller, job.adapters),
            priority=job.priority,
            deadline=deadline(job.timeout, self.config.max_request_seconds),
            traceparent=None if sample.span is None else sample.span.context.traceparent,
        )

    def _send(self, sample: Sample, message: Submit, deliver: Callable[[Output], None]) -> None:
        def take(output: Output) -> None:
            if output.again:
                sample.versions = VersionHistory(sample.held.label)
            if output.switch is None:
                deliver(output)
            else:
                sample.versions.switch(output.switch.start, sample.held.label)

        self.admission.submit(sample.ticket, message, take)
        self.observer.submitted(sample.origin)


def _ending(sample: Sample, context_length: int) -> Ending:
    sampling, finished = sample.job.sampling, sample.stream.finished
    asked = sampling.max_new_tokens
    return Ending(
        reason=finished.type if finished else "abort",
        error=finished.kind if finished and finished.type == "error" else "",
        prompt_tokens=len(sample.prompt_ids),
        generated=sample.stream.completion_tokens,
        n=sampling.n,
        max_tokens=None if asked is None else min(asked, context_length),
        seconds=sample.seconds,
        first_seconds=sample.first_seconds,
        queue_seconds=sample.queue_seconds,
    )


def _encode(samples: Sequence[Sample], context_length: int) -> list[list[int]]:
    return [
        encode(
            job.prompt,
            vocabulary,
            context_length,
            job.param,
            answered=job.pooling is None,
            padded=job.pooling is not None and job.pooling.scores,
        )
        for job, vocabulary in ((sample.job, sample.vocabulary) for sample in samples)
    ]
