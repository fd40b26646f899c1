"""What a front process and the one that holds the registry say to each other: msgspec structs, msgpack over ZeroMQ.

Worker → supervisor: `Serving` once; `Submit`, `Abort`, `Finish` and `UseTokenizer` as an engine is told them;
`EndSample`, `ReleaseAdapters`, `NamesApplied`, `Observed`; and questions (`JoinNames`, `OpenSamples`,
`HoldAdapters`, `TakeRequest`), each answered by one `Answer` with the same `call` number.
Supervisor → worker: `Welcome` once, then `Relayed`, `Answer`, `NamesChanged`, `ReloadKeys`, `Collect`, `Drain`.
"""

import msgspec

from multilora.config import Config
from multilora.engine.messages import Abort, AdapterInfo, Finish, Output, Ready, Submit, UseTokenizer
from multilora.front.access import Caller
from multilora.front.adapter_ref import AdapterRef, RefState
from multilora.front.adapter_spec import AdapterSpec
from multilora.front.admission import Ticket, Wanted
from multilora.front.observer import Ending, FirstOutput, Origin
from multilora.front.versions import VersionLabel
from multilora.logs import LogLine
from multilora.params import Composition


class OpenSamples(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """See `SampleAdmission.open`. Answer.samples."""

    call: int
    caller: Caller
    wanted: list[Wanted]
    rids: list[str] | None


class HoldAdapters(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """See `Resolver.hold`. Answer.hold: what `ReleaseAdapters` names. traceparent: the request's span, if it is
    traced."""

    call: int
    caller: Caller
    names: list[str]
    traceparent: str | None = None


class TakeRequest(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """See `Quotas.take_request`."""

    call: int
    caller: Caller


class JoinNames(msgspec.Struct, tag=True, frozen=True):
    """The worker is about to serve. The answer's `seq` is the latest change that nobody has waited for it to apply;
    from then on every change is acknowledged only when this worker, too, goes by it."""

    call: int


class EndSample(msgspec.Struct, tag=True, frozen=True):
    """The sample has ended, and its client knows."""

    key: str


class ReleaseAdapters(msgspec.Struct, tag=True, frozen=True):
    """See `Resolver.release`."""

    hold: int


class NamesApplied(msgspec.Struct, tag=True, frozen=True):
    """Requests that come from now on see the names as of that `NamesChanged`."""

    seq: int


class TokenTimes(msgspec.Struct, frozen=True):
    """Times between tokens: how many there were up to each of the bounds that both sides know, and their sum."""

    counts: list[int]
    sum: float


class Observed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What a worker has counted since it last said so. call: of the `Collect` that this answers.

    later: of the outputs after a sample's first. verified: drafts, tokens and right ones of each. refused: jobs, with
    the error's kind.
    http: route, method, status, seconds. log: what the worker has logged, for the console.
    """

    call: int | None = None
    submitted: list[Origin] = []
    first: list[tuple[Origin, FirstOutput]] = []
    later: list[tuple[Origin, TokenTimes]] = []
    verified: list[tuple[Origin, list[tuple[int, int]]]] = []
    ended: list[tuple[Origin, Ending]] = []
    refused: list[tuple[Origin, str]] = []
    http: list[tuple[str, str, int, float]] = []
    log: list[LogLine] = []


class Serving(msgspec.Struct, tag=True, frozen=True):
    """The worker takes connections from now on."""


class NameRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One version of one adapter in the registry: see `AdapterRef`."""

    name: str
    path: str
    version: int
    pinned: bool
    state: RefState
    weight_version: str | None = None
    info: AdapterInfo | None = None
    parts: AdapterSpec = ()

    @classmethod
    def of(cls, ref: AdapterRef) -> "NameRow":
        """The version as it is now."""
        return cls(**{name: getattr(ref, name) for name in cls.__struct_fields__})

    def ref(self) -> AdapterRef:
        """The version as the registry has it, but for who holds it."""
        return AdapterRef(**{name: getattr(self, name) for name in self.__struct_fields__})


class SampleRow(msgspec.Struct, frozen=True, array_like=True):
    """A `Ticket`, as the worker needs it."""

    rid: str
    key: str
    composition: Composition
    label: VersionLabel
    sole_version: int | None
    refs: list[NameRow] = []

    @classmethod
    def of(cls, ticket: Ticket) -> "SampleRow":
        """The ticket of a sample that has just been opened."""
        held, refs = ticket.held, [NameRow.of(ref) for ref in ticket.held.refs]
        return cls(ticket.rid, ticket.key, held.composition, held.label, ticket.sole_version, refs)


class NamesChanged(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Versions whose state is another one now. weight_version: of the server."""

    seq: int
    rows: list[NameRow]
    weight_version: str


class Welcome(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What a worker begins with. relay: the path of the socket that takes what is not a worker's to answer."""

    config: Config
    ready: Ready
    names: NamesChanged
    relay: str


class Relayed(msgspec.Struct, tag=True, frozen=True):
    """The engine's outputs for this worker's samples. labels: of the outputs with a `switch`, in their order: what
    the sample runs on from then on."""

    items: list[Output]
    labels: list[VersionLabel] = []


class Answer(msgspec.Struct, tag=True, frozen=True, kw_only=True, omit_defaults=True):
    """Answer to a question. Not ok: `kind`, `message`, `param`, `retry_after` of the error. seq: the latest
    `NamesChanged`, which it may refer to."""

    call: int
    seq: int = 0
    kind: str = ""
    message: str = ""
    param: str | None = None
    retry_after: int | None = None
    samples: list[list[SampleRow]] = []
    hold: int = 0


class ReloadKeys(msgspec.Struct, tag=True, frozen=True):
    """Read --auth-file again."""


class Collect(msgspec.Struct, tag=True, frozen=True):
    """Say now what has been counted."""

    call: int


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Take no further connections, finish what runs, and end."""


Question = OpenSamples | HoldAdapters | TakeRequest | JoinNames
FromWorker = (
    Question
    | Submit
    | Abort
    | Finish
    | UseTokenizer
    | EndSample
    | ReleaseAdapters
    | NamesApplied
    | Observed
    | Serving
)
ToWorker = Welcome | Relayed | Answer | NamesChanged | ReloadKeys | Collect | Drain

_encoder = msgspec.msgpack.Encoder()
_from_worker = msgspec.msgpack.Decoder(FromWorker)
_to_worker = msgspec.msgpack.Decoder(ToWorker)


def encode(message: FromWorker | ToWorker) -> bytes:
    return _encoder.encode(message)


def decode_from_worker(data: bytes) -> FromWorker:
    message: FromWorker = _from_worker.decode(data)
    return message


def decode_to_worker(data: bytes) -> ToWorker:
    message: ToWorker = _to_worker.decode(data)
    return message
