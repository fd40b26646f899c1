"""A worker's front: requests as everywhere, while registry and admission are the supervisor's, without I/O.

`RegistryReplica` has the names, for reading bodies; who may run, and on which versions, is asked (`effects.Ask`) for
each request, so no worker can go on with an adapter that the supervisor has replaced or unloaded.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from multilora.config import Config
from multilora.engine.messages import Output, Submit
from multilora.errors import MultiloraError
from multilora.front.access import CALLER
from multilora.front.adapter_ref import Held, RefState
from multilora.front.admission import Ticket, Wanted
from multilora.front.effects import Ask, Steps
from multilora.front.engine_link import RequestLink
from multilora.front.observer import Observer
from multilora.front.registry import AdapterRegistry
from multilora.front.request_front import RequestFront
from multilora.front.tokenizer import Tokenizer
from multilora.front.versions import VersionLabel
from multilora.front.vocabulary import Vocabularies
from multilora.front.workers.messages import Answer, HoldAdapters, NameRow, NamesChanged, OpenSamples, SampleRow
from multilora.tracing import current_traceparent

logger = logging.getLogger(__name__)

VISIBLE = (RefState.LOADED, RefState.UNLOADING)
"""States of the versions that a name stands for."""


class SupervisorSide(RequestLink, Protocol):
    """The supervisor as a worker's front sees it: an engine, and the end of samples and holds."""

    @property
    def label(self) -> VersionLabel:
        """What the sample of an output with `switch` runs on, while that is delivered."""

    def end(self, key: str) -> None: ...

    def release(self, hold: int) -> None: ...


class RegistryReplica(AdapterRegistry):
    """The supervisor's names, as they were said last. Nothing is loaded, acquired or counted here."""

    def knows(self, version: int) -> bool:
        """Whether requests may name this version here."""
        return version in self._versions

    def take(self, row: NameRow) -> None:
        """A version is in another state now."""
        before = self._versions.pop(row.version, None)
        if row.state in VISIBLE:
            self._versions[row.version] = self._current[row.name] = row.ref()
        elif before is not None and self._current.get(row.name) is before:
            del self._current[row.name]


@dataclass(frozen=True)
class RemoteHold(Held):
    """What the supervisor's resolver holds for a request: its number there."""

    number: int = 0


class RemoteAdmission:
    """See `SampleAdmission`."""

    def __init__(self, link: SupervisorSide):
        self._link = link

    def open(self, wanted: Sequence[Wanted], rids: Sequence[str] | None) -> Steps[list[list[Ticket]]]:
        caller = CALLER.get()
        names = None if rids is None else list(rids)
        answer = yield from Ask(
            lambda call: OpenSamples(call=call, caller=caller, wanted=list(wanted), rids=names), self._undo
        )
        return [
            [
                Ticket(row.rid, row.key, number, caller, _held(row), row.sole_version)
                for number, row in enumerate(rows)
            ]
            for rows in answer.samples
        ]

    def submit(self, ticket: Ticket, message: Submit, deliver: Callable[[Output], None]) -> None:
        ticket.submitted = True
        self._link.submit(message, partial(self._take, ticket, deliver))

    def end(self, ticket: Ticket) -> None:
        self._link.end(ticket.key)

    def _take(self, ticket: Ticket, deliver: Callable[[Output], None], output: Output) -> None:
        if output.switch is not None:
            ticket.held = replace(ticket.held, label=self._link.label)
        deliver(output)

    def _undo(self, answer: Answer) -> None:
        for rows in answer.samples:
            for row in rows:
                self._link.end(row.key)


class RemoteResolver:
    """See `AdapterHolder`."""

    def __init__(self, link: SupervisorSide, active: bool):
        self.active = active
        self._link = link

    def hold(self, names: Iterable[str]) -> Steps[Sequence[Held]]:
        caller, wanted, span = CALLER.get(), list(names), current_traceparent()
        if not wanted:
            return ()
        answer: Answer = yield from Ask(
            lambda call: HoldAdapters(call=call, caller=caller, names=wanted, traceparent=span),
            lambda answer: self._link.release(answer.hold),
        )
        return (RemoteHold(number=answer.hold),)

    def release(self, held: Sequence[Held]) -> None:
        for one in held:
            assert isinstance(one, RemoteHold)
            self._link.release(one.number)


class WorkerFront(RequestFront):
    """The front of one worker."""

    registry: RegistryReplica

    def __init__(self, config: Config, link: SupervisorSide, tokenizer: Tokenizer | None, observer: Observer):
        registry = RegistryReplica(
            config.model_name, config.enable_lora, config.max_loaded_loras, config.max_loras_per_tenant
        )
        vocabularies = Vocabularies(tokenizer, link.ready, registry, config.lora_root)
        admission, resolver = RemoteAdmission(link), RemoteResolver(link, config.has_resolver)
        super().__init__(config, link, registry, vocabularies, admission, resolver, observer)

    def apply(self, change: NamesChanged) -> None:
        """Requests see the names so from now on. The tokens of a new version are known by then, see `read_tokens`."""
        for row in change.rows:
            self.registry.take(row)
            if row.state is RefState.GONE:
                self.vocabularies.remove(row.version)
        self.registry.weight_version = change.weight_version

    def unread(self, change: NamesChanged) -> Iterator[NameRow]:
        """The versions that are new here and may have tokens of their own."""
        for row in change.rows:
            new = row.state in VISIBLE and not self.registry.knows(row.version)
            if new and row.info is not None and self.vocabularies.concerns(row.info):
                yield row

    def read_tokens(self, row: NameRow) -> None:
        """Look for the tokenizer of an adapter, as the supervisor has done when it was loaded. This may read for a
        second, on any thread. Where the files are gone meanwhile, its requests have to carry token ids."""
        assert row.info is not None
        try:
            self.vocabularies.add(row.info, row.info.path)
        except MultiloraError as e:
            logger.error("the tokenizer of adapter %r cannot be read again: %s", row.name, e)
            reason = "the adapter's tokenizer could not be read again by this process: load the adapter again"
            self.vocabularies.add_unread(row.info, reason)


def _held(row: SampleRow) -> Held:
    return Held(row.composition, tuple(ref.ref() for ref in row.refs), row.label)
