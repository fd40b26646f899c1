"""What the front and the engine say to each other: msgspec structs, sent as msgpack over ZeroMQ, no pickle.

Front → engine: `Submit`, `Abort`, `Finish`, and calls (`LoadAdapter`, `ReplaceAdapter`, `UnloadAdapter`,
`FlushCache`, `Pause`, `Resume`, `Sleep`, `WakeUp`, `StartProfile`, `StopProfile`), each answered by one `Reply` with
the same `call` number; `UseTokenizer` once, `Shutdown` at the end.
Engine → front: `Ready` once, then `Outputs`, `Reply`, `Stats` and `Spans`.

Adapters are *versions* here: integers that the front's registry hands out and never reuses.
"""

from typing import Literal

import msgspec

from multilora.params import (
    ClassifierSettings,
    Composition,
    EmbeddingSettings,
    LogprobsMode,
    PoolingParams,
    SamplingParams,
)
from multilora.tracing import SpanRecord


class Submit(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """One sequence to generate (`n` > 1 is several Submits), or to be read only: with `pooling` there is no answer
    but one row of numbers, and `sampling.max_new_tokens` is 0."""

    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    adapters: Composition = ()
    return_logprob: bool = False
    logprob_start_len: int = -1  # first prompt position whose logprob is wanted; -1: none of the prompt
    top_logprobs_num: int = 0
    prompt_logprobs: int | None = None  # so many of the best tokens, and ranks, for each token of the prompt
    return_ranks: bool = False  # of the answer's tokens, with their logprobs
    logprobs_mode: LogprobsMode = "raw"  # of the answer's tokens
    grammar: str | None = None  # an xgrammar CompiledGrammar, serialized to JSON
    pooling: PoolingParams | None = None
    salt: str = ""  # requests share cached pages only with requests of the same salt
    tenant: str = ""
    priority: int = 0  # the lowest number first, under the scheduling policy of that name
    deadline: float | None = None  # monotonic seconds of this machine
    traceparent: str | None = None  # the span that it belongs below; None: it is not traced


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End the request with `abort` (its last Output says so). An unknown rid is ignored."""

    rid: str
    message: str = "aborted"


class Finish(msgspec.Struct, tag=True, frozen=True):
    """The front found a stop string and has already told the client; the engine drops the request silently."""

    rid: str


class LoadAdapter(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Fetch, check and pack the adapter; keep it in host memory as `version`. Reply.info: AdapterInfo."""

    call: int
    version: int
    path: str  # directory or hub repository id
    pinned: bool = False
    traceparent: str | None = None


class ReplaceAdapter(msgspec.Struct, tag=True, frozen=True):
    """Requests on `version`, running, waiting or yet to come, go on with `successor`; both are loaded. Answered at
    once: the steps that are launched from then on use the successor. Each request that changes is told of by an
    `AdapterSwitch`; one that cannot change finishes on `version`."""

    call: int
    version: int
    successor: int


class UnloadAdapter(msgspec.Struct, tag=True, frozen=True):
    """Forget the version and free its memory. The front has no request on it any more; answered once the engine has
    none either."""

    call: int
    version: int


class FlushCache(msgspec.Struct, tag=True, frozen=True):
    """Drop every idle prefix page. retract: running requests go back to the queue first and are computed anew, so
    that no page is in use."""

    call: int
    retract: bool = False


PauseMode = Literal["keep", "wait", "abort", "retract"]
"""What a pause does with the requests that the engine has: they freeze where they are; they finish, and the pause
begins then; they end with `abort`; they freeze and give their KV pages back, to be computed anew afterwards."""

MemoryTag = Literal["weights", "kv_cache"]
"""What can be released: the base model's weights; the arena, with KV cache and resident adapters."""


class Pause(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Plan no step until `Resume`. Answered once no step is in flight and, with `wait`, no request is left.

    queues: requests that come meanwhile wait in the queue; else they end with EnginePaused. A second Pause replaces
    the first one's mode. Reply.pause: PauseState.
    """

    call: int
    mode: PauseMode
    queues: bool


class Resume(msgspec.Struct, tag=True, frozen=True):
    """Plan steps again; fails while the engine is asleep. Reply.pause: PauseState."""

    call: int


class Sleep(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Pause, then release memory of the device. Adapters stay in host memory, the prefix cache is emptied.

    level 0: pause only; requests that come wait in the queue, on other levels they end with EngineAsleep.
    level 1: weights on a GPU are kept in host memory.
    level 2: weights are discarded, and read from their files again at `WakeUp`.
    mode None: a pause that is there already stays, and outlasts the sleep; else as `keep`. Reply.pause: PauseState.
    """

    call: int
    level: int
    tags: list[MemoryTag]
    mode: PauseMode | None


class WakeUp(msgspec.Struct, tag=True, frozen=True):
    """Take released memory of these tags again. Once none is missing the engine is awake and generates again.

    Reply.pause: PauseState. Fails with OutOfMemory if the device lacks room; what is restored by then stays.
    """

    call: int
    tags: list[MemoryTag]


class StartProfile(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Record what the engine's process does, with torch's profiler, and write the trace to `path` (`.json.gz`).

    start_step: number of the first step; None: at once. num_steps: it ends by itself after so many.
    activities: of "CPU", "GPU"; the latter is nothing where there is none.
    """

    path: str
    call: int = 0
    start_step: int | None = None
    num_steps: int | None = None
    activities: list[str]
    with_stack: bool = True
    record_shapes: bool = False


class StopProfile(msgspec.Struct, tag=True, frozen=True):
    """End the profile and write the trace; the Reply comes when it is written."""

    call: int


class UseTokenizer(msgspec.Struct, tag=True, frozen=True):
    """xgrammar's serialized TokenizerInfo, which the grammars of later Submits are bound to."""

    info: str


class ShareService(msgspec.Struct, tag=True, frozen=True):
    """Charge tenants for what other engines have served them: tenant → service, in the weighted tokens of `fair`.
    Reply.served: what this one has served, since the last such call."""

    call: int
    elsewhere: dict[str, float]


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Finish what runs (the front sends nothing new), then end the process."""


class Finished(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a request ended. `error`: kind and message as in `multilora.errors`."""

    type: Literal["stop", "length", "abort", "error"]
    matched: int | None = None  # the EOS or stop token id
    message: str = ""
    kind: str = ""  # error class name


TopLogprobs = list[tuple[float, int]]
"""(logprob, token id), best first, the lowest ids first among equals."""


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """How likely one token was, and which tokens were the likeliest at its position, by log-softmax: of the raw
    logits, or of what the token was drawn from (`LogprobsMode`). What is not finite (a padded vocabulary, a masked
    token, NaN) is None, or left out of `top`."""

    logprob: float | None
    top: TopLogprobs = []
    rank: int | None = None  # the token's place in that order, from 1 on; None: not asked for


class AdapterSwitch(msgspec.Struct, frozen=True, array_like=True):
    """The request goes on with adapter version `new` instead of `old`: its answer's tokens from index `start` on, of
    which some before may still be on their way."""

    start: int
    old: int
    new: int


class Output(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """New tokens of one request; none with `switch`. The last one carries `finished`; nothing follows it.

    again: the engine has ended and the request runs again on the next one; what came before is void.
    pooled: comes with the end of a request that asked for pooling: float32 numbers, little-endian.
    drafted, accepted: the tokens of the draft that was verified for these, and how many of them were right.
    logprobs: parallel to `token_ids`; empty where not asked for. input_logprobs come with the first Output, one per
    prompt token from `logprob_start_len` on; None for the first prompt token of all, which has none.
    """

    rid: str
    token_ids: list[int] = []
    finished: Finished | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    again: bool = False
    logprobs: list[Logprobs] = []
    input_logprobs: list[Logprobs | None] = []
    switch: AdapterSwitch | None = None
    pooled: bytes = b""
    drafted: int = 0
    accepted: int = 0


class Outputs(msgspec.Struct, tag=True, frozen=True):
    items: list[Output]


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded: for logs, metrics and the routes."""

    version: int
    path: str
    rank: int  # the largest of any module
    target_modules: list[str]
    nbytes: int  # in host memory, packed
    pages: int  # of the arena, when resident
    not_composable_reason: str = ""  # why it cannot be part of a composition; empty: it can
    vocab_size: int | None = None  # of its own head; None: the base model's
    trains_tokens: bool = False  # it may have tokens that the base model's tokenizer does not know
    num_labels: int = 0  # of its own classification head; 0: it has none
    fingerprint: str = ""  # of what its files hold


class PauseState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the engine generates. mode: of the pause, None: there is none; released: what sleeps; level: of the
    sleep, 0 where it does not concern the weights."""

    mode: PauseMode | None = None
    sleeping: bool = False
    level: int = 0
    released: list[MemoryTag] = []


class Reply(msgspec.Struct, tag=True, frozen=True, kw_only=True, omit_defaults=True):
    """Answer to a call. `kind` and `message` name the error (see `multilora.errors.from_wire`) when not ok."""

    call: int
    ok: bool = True
    kind: str = ""
    message: str = ""
    info: AdapterInfo | None = None
    pause: PauseState | None = None
    served: dict[str, float] = {}


class Spans(msgspec.Struct, tag=True, frozen=True):
    """What engine and loader have done for traced requests."""

    items: list[SpanRecord]


class AdapterStats(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter version, cumulative counters and where it is now."""

    version: int
    level: Literal["disk", "host", "device"]
    pinned: bool
    rank: int
    running: int  # requests
    waiting: int
    host_bytes: int
    device_bytes: int
    loads: int  # host → device
    evictions: int  # device → host
    fetches: int  # disk or hub → host
    hits: int  # requests that found it resident
    misses: int
    load_seconds: float


class Stats(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The state of the engine, sent about once a second while it works and once when it becomes idle.

    Adapters travel only if they have changed: `AdapterStatsTable` adds the messages up to the whole picture.
    """

    running: int
    waiting: int
    total_pages: int
    free_pages: int
    kv_pages: int
    prefix_pages: int
    adapter_pages: int
    page_bytes: int
    block_pages: int = 1  # pages of the tokens of one page that all layers keep (`memory/kv_layout.py`)
    prompt_tokens: int  # cumulative, prefilled
    cached_tokens: int  # cumulative, taken from the prefix cache
    generated_tokens: int  # cumulative
    preemptions: int
    steps: int
    slots_total: int  # how many adapters can be resident: the limit, or what memory allows at their mean size
    slots_used: int
    adapters: list[AdapterStats]  # all, or in an update those that have changed since the one before
    unloaded: list[int] = []  # versions that are gone since the update before
    pause: PauseState = PauseState()
    gen_throughput: float = 0.0  # tokens a second, in the latest second or less in which any were generated
    cache_hit_rate: float = 0.0  # of the prompt tokens of the latest second with any, the part that was cached
    step_tokens: list[int] = []  # cumulative: steps of up to 1, 2, 4, … 16384 tokens, and of more

    @property
    def usage(self) -> float:
        """Part of the pages that running requests and adapters hold, 0 to 1."""
        held = self.total_pages - self.free_pages - self.prefix_pages
        return held / self.total_pages if self.total_pages else 0.0


class Ready(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The engine is up: what the front must know to check requests at the door."""

    context_length: int
    vocab_size: int
    eos_token_ids: list[int]
    num_layers: int
    dtype: str
    device: str
    lora_backend: str
    attention_backend: str
    embedding: EmbeddingSettings
    classifier: ClassifierSettings | None = None
    generates: bool = True  # False: it has no language-model head
    pad_token_id: int | None = None
    stats: Stats


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine could not start: a ConfigError, ModelUnsupported, OutOfMemory … as in `multilora.errors`."""

    kind: str
    message: str


ToEngine = (
    Submit | Abort | Finish | LoadAdapter | ReplaceAdapter | UnloadAdapter | FlushCache | Pause | Resume | Sleep
    | WakeUp | StartProfile | StopProfile | UseTokenizer | ShareService | Shutdown
)  # fmt: skip
FromEngine = Ready | Failed | Outputs | Reply | Stats | Spans

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    message: ToEngine = _to_engine.decode(data)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    message: FromEngine = _from_engine.decode(data)
    return message
