"""Between requests and the data of a plan: a request's next tokens as a `Chunk`, its news as an `Output`, its
sampling parameters as a `SamplingState`.

Reads requests; changes only what of them has been sent (pages, a first Output) and which prompt logprobs have come.
Called by `scheduler.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from multilora.engine.faults import kind_of
from multilora.engine.messages import Finished, Logprobs, Output
from multilora.engine.plan import Chunk, PageUpdate, PooledChunk, PromptLogprobs, StepPlan
from multilora.engine.sampling.state import SamplingState, needs_prompt
from multilora.engine.scheduling.request import Request, RequestSpec
from multilora.params import Composition


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A plan on its way. runs: the request of each chunk, and its epoch then: another one means it was preempted."""

    plan: StepPlan
    runs: list[tuple[Request, int]]
    launched_at: float


def make_chunk(request: Request, count: int) -> Chunk:
    """The next `count` tokens of a running request. A token follows them if they are all that remains."""
    progress, spec = request.progress, request.spec
    assert request.slot is not None
    start = progress.num_scheduled
    samples = count == progress.remaining and spec.samples
    return Chunk(
        request.slot,
        start,
        count,
        request.token_ids(start, count),
        request.lora_slots,
        spec.weights,
        min(count, max(0, spec.activation - start)),
        (len(progress.output_ids) + progress.in_flight,) if samples else (),
        count == 1 and start >= progress.num_prompt,
        _prompt_logprobs(request, start, count),
        None if spec.pooling is None else PooledChunk(spec.pooling, count == progress.remaining),
    )


def make_draft_chunk(request: Request, draft: list[int]) -> Chunk:
    """The last known token of a running request and the draft of what follows: a token is sampled after each."""
    progress = request.progress
    assert request.slot is not None
    first = len(progress.output_ids)
    return Chunk(
        request.slot,
        progress.num_scheduled,
        1 + len(draft),
        [*request.token_ids(progress.num_scheduled, 1), *draft],
        request.lora_slots,
        request.spec.weights,
        answer_positions=tuple(range(first, first + 1 + len(draft))),
        decodes=True,
    )


def take_page_update(request: Request) -> PageUpdate | None:
    """The pages that the runner does not know yet; it does from then on. None: it knows all."""
    known, table = request.sent_pages, request.table.pages
    if known == len(table):
        return None
    assert request.slot is not None
    request.sent_pages = len(table)
    return PageUpdate(request.slot, known, table[known:])


def sampling_state(spec: RequestSpec, slot: int, eos_token_ids: tuple[int, ...]) -> SamplingState:
    """What the sampler is told of a request when it first runs."""
    return SamplingState(
        slot=slot,
        params=spec.params,
        seed=spec.seed,
        prompt_ids=spec.prompt_ids if needs_prompt(spec.params) else [],
        end_ids=(*(spec.params.stop_token_ids or ()), *(() if spec.params.ignore_eos else eos_token_ids)),
        vocab_size=spec.vocab_size,
        top_logprobs=spec.top_logprobs,
        ranks=spec.return_ranks,
        processed=spec.logprobs_mode == "processed",
        grammar=spec.grammar,
    )


def _prompt_logprobs(request: Request, start: int, count: int) -> PromptLogprobs | None:
    """What is still wanted of the prompt's logprobs in [start, start + count)."""
    positions = request.prompt_logprob_positions(start, count)
    if not positions:
        return None
    next_ids = request.spec.prompt_ids[positions.start + 1 : positions.stop + 1]
    return PromptLogprobs(positions.start, next_ids, request.spec.prompt_top, request.spec.prompt_ranks)


def take_prompt_logprobs(request: Request, wanted: PromptLogprobs | None, found: list[Logprobs]) -> None:
    """A chunk planned again after a preemption may bring some that have come in the meantime."""
    if wanted is None:
        return
    known = request.logprob_position - wanted.first
    request.progress.prompt_logprobs += found[known:]


def adapter_order(run: tuple[Request, Chunk]) -> tuple[Composition, int]:
    """Sort key: equal compositions side by side, base first; among them first those that begin before activation."""
    request, chunk = run
    acts = chunk.pre_activation < chunk.count
    return request.spec.adapters if acts else (), -chunk.pre_activation


def failure(request: Request, fault: str) -> Finished:
    """The ending of a request whose step went wrong for it alone."""
    kind = kind_of(fault, adapted=bool(request.spec.adapters))
    return Finished(type="error", kind=kind, message=fault)


def make_output(
    request: Request,
    now: float,
    tokens: list[int],
    finished: Finished | None,
    logprobs: Sequence[Logprobs | None] = (),
    pooled: bytes = b"",
    drafted: int = 0,
    accepted: int = 0,
) -> Output:
    """The first one of a request carries its prompt logprobs. now: monotonic seconds; logprobs: of the tokens, None
    where not asked for."""
    spec, prompt = request.spec, request.progress.prompt_logprobs
    input_logprobs: list[Logprobs | None] = []
    if not request.first_output_sent and spec.prompt_logprobs_from is not None:
        input_logprobs = [None, *prompt] if spec.prompt_logprobs_from == 0 else [*prompt]
    request.first_output_sent = True
    return Output(
        rid=spec.rid,
        token_ids=tokens,
        finished=finished,
        prompt_tokens=len(spec.prompt_ids),
        cached_tokens=request.cached_tokens,
        queue_seconds=(request.admitted or now) - spec.arrival,
        logprobs=[one for one in logprobs if one is not None],
        input_logprobs=input_logprobs,
        pooled=pooled,
        drafted=drafted,
        accepted=accepted,
    )
