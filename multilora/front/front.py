"""The one road from a client's request to the engine, whichever door it came through, without I/O.

`Front.submit` checks everything before anything is sent. Each sample holds its adapters from before its prompt is
tokenized until its one ending (stop, length, abort or error). `Front.adapters` loads and unloads
them; `Front.resolver` loads those that are asked for by a name that is not loaded.
"""

import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import msgspec

from multilora.adapters.sources.spool import Spool
from multilora.config import Config
from multilora.engine.messages import AdapterSwitch, Finished, Output, Submit
from multilora.engine.scheduling.policy import POLICIES
from multilora.errors import (
    BadRequest,
    EngineDead,
    EngineRestarting,
    Forbidden,
    MultiloraError,
    QueueFull,
    ServerStopping,
)
from multilora.front.access import CALLER, Caller, Limits, Tenant
from multilora.front.adapter_manager import AdapterManager
from multilora.front.classification import check_head, classified_tokens
from multilora.front.effects import Lane, RunBlocking, Steps
from multilora.front.engine_link import EngineLink
from multilora.front.fetcher import Fetcher
from multilora.front.generation import Generation, Job, Sample
from multilora.front.grammar import Grammars
from multilora.front.observer import Ending, Observer, origin_of
from multilora.front.pause_manager import PauseManager
from multilora.front.prompt import (
    ChatPrompt,
    PairPrompt,
    TextPrompt,
    check_logprobs,
    check_prompt,
    check_stops,
    deadline,
    engine_params,
    tenant_salt,
)
from multilora.front.quotas import Quotas
from multilora.front.records import Records
from multilora.front.registry import AdapterRegistry
from multilora.front.request_span import end_span
from multilora.front.resolver import Resolver
from multilora.front.restoring import load_at_start
from multilora.front.stream import TextStream
from multilora.front.tenants import tenant_of
from multilora.front.tokenizer import Tokenizer
from multilora.front.versions import VersionHistory
from multilora.front.vocabulary import Vocabularies
from multilora.params import LOGPROBS_MODES

STOPPING = "the server is being stopped; try again later, or elsewhere"
INLINE_CHARS = 2048
"""Texts of one request that are tokenized at once, 1 ms; more goes to a thread, which costs 0.15 ms."""
LONG_CHARS = 256 << 10
"""More than these do not keep shorter ones waiting, 0.2 s."""


class Front:
    """The engine, the names, the vocabularies and the grammars that all requests share, and which samples are open.

    tokenizer: None: token ids only. spool: where adapters are kept that do not come from a directory or the hub.
    observer: who counts requests; None: nobody. records: what is written down of adapters; None: nothing.
    """

    def __init__(
        self,
        config: Config,
        engine: EngineLink,
        tokenizer: Tokenizer | None,
        spool: Spool,
        observer: Observer | None = None,
        records: Records | None = None,
    ):
        ready = engine.ready
        self.config = config
        self.engine = engine
        self.observer = observer or Observer()
        self.registry = AdapterRegistry(
            config.model_name, config.enable_lora, config.max_loaded_loras, config.max_loras_per_tenant
        )
        self.vocabularies = Vocabularies(tokenizer, ready, self.registry, spool.admit(config).lora_root)
        self.records = records or Records()
        fetcher = Fetcher(config, spool)
        self.adapters = AdapterManager(
            self.registry,
            self.vocabularies,
            spool,
            fetcher,
            self.observer,
            self.records,
            config.lora_load_timeout,
        )
        self.resolver = Resolver(config, self.registry, self.adapters, fetcher, self.observer)
        self.pauses = PauseManager()
        self.quotas = Quotas()
        self._room = config.max_running_requests + config.max_queued_requests
        self._grammars = Grammars(self.vocabularies.base, engine)
        self._open: dict[tuple[str, str], Sample] = {}  # by tenant and rid
        self._serial = itertools.count()
        self._stopped = False

    def load_at_start(self) -> Steps[None]:
        """Load what is there from the start: --lora-paths, and what the records have. See `restoring.py`."""
        return load_at_start(self.adapters, self.registry, self.records, self.config.lora_paths)

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
        count = sum(job.sampling.n for job in jobs)
        caller = CALLER.get()
        self._check_room(count)
        unused = iter(self._check_rids(caller, rids, count))
        self.registry.check_request(job.adapters for job in jobs)
        self._check_priorities(jobs)
        generation = Generation(self.engine, self.observer, self._end)
        try:
            groups = [self._open_samples(generation, job, caller, unused) for job in jobs]
            self._admit(caller, generation.samples)
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

    def abort(self, rid: str | None, message: str = "aborted") -> int:
        """Abort the request `rid`, all of its samples; None: every request. They end with `abort`. Returns how many
        requests that are. Only the requests of the caller's tenant can be named; every one is an admin's to abort.

        Raises Forbidden.
        """
        caller, found = CALLER.get(), set()
        if rid is None and not caller.admin:
            raise Forbidden("all requests: they are the admin's to abort; name yours", param="rid")
        for (tenant, open_rid), sample in list(self._open.items()):
            if not caller.admin and tenant != caller.tenant.name:
                continue
            if rid is None or open_rid == rid or open_rid.rpartition("#")[0] == rid:
                sample.abort_message = message
                if sample.submitted:
                    self.engine.abort(sample.key, message)
                found.add((tenant, open_rid.rpartition("#")[0] or open_rid))
        return len(found)

    def stop(self) -> None:
        """The server waits no longer: requests that are there end with ServerStopping, at once and whatever the
        engine does, and no further one is submitted."""
        self._stopped = True
        finished = Finished(type="error", kind="ServerStopping", message=STOPPING)
        for sample in list(self._open.values()):
            if sample.deliver is not None:
                sample.deliver(Output(rid=sample.key, finished=finished))
                self.engine.abort(sample.key)

    def _end(self, sample: Sample) -> None:
        """The sample has ended: release its adapters."""
        del self._open[sample.scope]
        self._let_go(sample)
        sample.grant.release()
        if sample.submitted or sample.span is not None:
            ending = _ending(sample, self.engine.ready.context_length)
        if sample.span is not None:
            end_span(sample.span, sample, ending, self.config.model_name)
        if sample.submitted:
            self.observer.ended(sample.origin, ending)
            for name, _ in sample.job.adapters:
                if self.registry.current(name) is None:  # unloaded while the client read what was there
                    self.observer.forget(name)

    def _let_go(self, sample: Sample) -> None:
        """The engine has ended its part: however slowly the client reads the rest, its adapters may be unloaded."""
        if not sample.let_go:
            sample.let_go = True
            self.registry.release(sample.held)

    def use_keys(self, tenants: Mapping[str, Tenant], adapters: Sequence[tuple[str, Limits]]) -> None:
        """There are these tenants from now on; adapters: see `Quotas`."""
        self.registry.tenants = tenants
        self.quotas.adapters = adapters

    @property
    def in_flight(self) -> int:
        """How many samples are open: checked, waiting or running."""
        return len(self._open)

    def open_samples(self) -> Iterator[tuple[str, bool]]:
        """Of each open sample its tenant and whether it has any output yet."""
        return ((tenant, sample.started) for (tenant, _), sample in self._open.items())

    def waiting_tokens(self) -> int:
        """Prompt tokens of the samples that have no output yet. O(open samples): not for each request."""
        return sum(len(sample.prompt_ids) for sample in self._open.values() if not sample.started)

    # ------------------------------------------------------------------ the steps of `submit`

    def _check_room(self, count: int) -> None:
        if not self.engine.alive:
            raise EngineDead("the engine process ended; restart the server")
        if self.engine.restarting:
            raise EngineRestarting("the engine is being started again; try again later")
        if count > self._room:
            raise BadRequest(f"{count} sequences in one request; the queue holds {self._room}")
        if len(self._open) + count > self._room:
            raise QueueFull(f"the queue is full: {len(self._open)} requests run or wait; try again later")

    def _check_priorities(self, jobs: Sequence[Job]) -> None:
        policy = self.config.schedule_policy
        asked = next((job.priority for job in jobs if job.priority), None)
        if asked is not None and not POLICIES[policy].heeds_priority:
            heeding = " or ".join(name for name, each in POLICIES.items() if each.heeds_priority)
            raise BadRequest(
                f"priority = {asked}: --schedule-policy is {policy}, which orders nothing by it; {heeding} does",
                param="priority",
            )

    def _admit(self, caller: Caller, samples: Sequence[Sample]) -> None:
        grants = self.quotas.admit(caller, [[ref.name for ref in sample.held.refs] for sample in samples])
        for sample, grant in zip(samples, grants, strict=True):
            sample.grant = grant

    def _check_rids(self, caller: Caller, rids: Sequence[str] | None, count: int) -> Sequence[str]:
        if rids is None:
            return [uuid.uuid4().hex for _ in range(count)]
        if len(set(rids)) < count or any(not rid or (caller.tenant.name, rid) in self._open for rid in rids):
            raise BadRequest("rid: each must be unique, not empty and not in use", param="rid")
        return rids

    def _open_samples(self, generation: Generation, job: Job, caller: Caller, rids: Iterator[str]) -> list[Sample]:
        """From here on the adapters of the job stay what they are now, whatever is loaded or unloaded."""
        vocabulary = self.vocabularies.of(job.adapters)
        vocabulary.check_grammar(job.sampling)
        check_stops(job.sampling, self.config.max_stop_strings)
        if job.sampling.stop_strings or job.sampling.stop_regexes:
            vocabulary.reader("a stop string", "stop")
        samples = []
        for number in range(job.sampling.n):
            eos_token_ids = self.engine.ready.eos_token_ids
            stream = TextStream(vocabulary.tokenizer, job.sampling, eos_token_ids, job.kept_tokens)
            held = self.registry.acquire(job.adapters)
            rid, index = next(rids), len(generation.samples)
            key = f"{rid}@{next(self._serial)}"
            versions = VersionHistory(held.label)
            sample = Sample(job, number, index, rid, key, held, caller, vocabulary, stream, versions)
            self._open[sample.scope] = sample
            generation.add(sample)
            samples.append(sample)
        return samples

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
        ends = sample.vocabulary.ends
        return Submit(
            rid=sample.key,
            input_ids=sample.prompt_ids,
            sampling=engine_params(job.sampling, length, context, vocab_size, sample=sample.number, ends=ends),
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
            if output.finished is not None:
                self._let_go(sample)
            if output.switch is None:
                deliver(output)
            else:  # at once, however slowly the client reads: what it held may be unloaded then
                self._switch(sample, output.switch)

        if self._stopped:
            raise ServerStopping(STOPPING)
        sample.submitted, sample.deliver = True, deliver
        if sample.number == 0:
            sample.grant.charge(len(sample.prompt_ids))
        self.engine.submit(message, take)
        self.observer.submitted(sample.origin)
        if sample.abort_message is not None:
            self.engine.abort(sample.key, sample.abort_message)

    def _switch(self, sample: Sample, switch: AdapterSwitch) -> None:
        """The engine goes on with another version of its adapter."""
        if self._open.get(sample.scope) is sample and not sample.let_go:
            sample.held = self.registry.switch(sample.held, switch.old, switch.new)
            sample.versions.switch(switch.start, sample.held.label)


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
    prompts = [(sample.job.prompt, sample.vocabulary) for sample in samples]
    return [p if isinstance(p, list) else p.encode(vocabulary, context_length) for p, vocabulary in prompts]
