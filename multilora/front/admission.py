"""Who may run: the one place where all requests of a server meet before their prompts are read, without I/O.

It owns the table of open tickets, one for each sample: by it a sample is counted, named by its rid, aborted, and
holds its adapters and its part of the quotas, from before its prompt is tokenized until its one ending. What becomes
of a sample's text is not its business. Called by `front.py`.
"""

import itertools
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from multilora.config import Config
from multilora.engine.messages import AdapterSwitch, Finished, Output, Submit
from multilora.engine.scheduling.policy import POLICIES
from multilora.errors import BadRequest, EngineDead, EngineRestarting, Forbidden, QueueFull, ServerStopping
from multilora.front.access import CALLER, Caller
from multilora.front.adapter_ref import Held
from multilora.front.adapter_spec import AdapterSpec
from multilora.front.effects import Steps
from multilora.front.engine_link import EngineLink
from multilora.front.quotas import UNLIMITED, Grant, Quotas
from multilora.front.registry import AdapterRegistry

MAX_RID = 256
"""Characters of a rid, which each frame of an answer repeats."""
STOPPING = "the server is being stopped; try again later, or elsewhere"


def check_rid(rid: str, param: str) -> None:
    """Raise BadRequest, naming the field `param`, for an id of a request that is too long to be repeated."""
    if len(rid) > MAX_RID:
        raise BadRequest(f"{param}: {len(rid)} characters; at most {MAX_RID} are served", param=param)


@dataclass(frozen=True)
class Wanted:
    """What one job of a request wants: `n` samples of the same prompt, on these adapters (full names)."""

    adapters: AdapterSpec
    n: int = 1
    priority: int = 0


@dataclass(eq=False)
class Ticket:
    """One admitted sample.

    `rid` is the client's word for it, which its tenant may use again later, and others at any time; `key` is the
    engine's and never comes again, so no late Output can reach another request. `number`: which of its job's `n`.
    sole_version: of the one adapter that acts, just as it is, see `AdapterRegistry.sole_version`.
    """

    rid: str
    key: str
    number: int
    caller: Caller
    held: Held
    sole_version: int | None = None
    grant: Grant = UNLIMITED
    prompt_tokens: int = 0  # once it is submitted
    submitted: bool = False
    started: bool = False  # its first output is here
    abort_message: str | None = None  # aborted before it was submitted
    deliver: Callable[[Output], None] | None = None  # once it is submitted
    let_go: bool = False  # it holds its adapters no longer

    @property
    def scope(self) -> tuple[str, str]:
        """The names of its tenant and of its own, which no other open ticket has."""
        return self.caller.tenant.name, self.rid


class SampleAdmission(Protocol):
    """What a front needs of it."""

    def open(self, wanted: Sequence[Wanted], rids: Sequence[str] | None) -> Steps[list[list[Ticket]]]:
        """The tickets of each job, whose adapters stay what they are now, whatever is loaded or unloaded. `rids`: one
        for each sample. On any error nothing is held."""

    def submit(self, ticket: Ticket, message: Submit, deliver: Callable[[Output], None]) -> None:
        """Send the sample to the engine; `deliver` gets its outputs, once `ticket.held` is as they say. Raises
        ServerStopping."""

    def end(self, ticket: Ticket) -> None:
        """The sample has ended, and its client knows: called once for each ticket."""


class LocalAdmission:
    """The admission of the process that holds the registry."""

    def __init__(self, config: Config, engine: EngineLink, registry: AdapterRegistry, quotas: Quotas):
        self._config = config
        self._engine = engine
        self._registry = registry
        self._quotas = quotas
        self._room = config.max_running_requests + config.max_queued_requests
        self._open: dict[tuple[str, str], Ticket] = {}  # by scope
        self._serial = itertools.count()
        self._stopped = False

    @property
    def in_flight(self) -> int:
        """How many samples are open: checked, waiting or running."""
        return len(self._open)

    def open_samples(self) -> Iterator[tuple[str, bool]]:
        """Each open sample's tenant, and whether it has any output yet."""
        return ((tenant, ticket.started) for (tenant, _), ticket in self._open.items())

    def waiting_tokens(self) -> int:
        """Prompt tokens of the samples that have no output yet. O(open samples): not for each request."""
        return sum(ticket.prompt_tokens for ticket in self._open.values() if not ticket.started)

    def open(self, wanted: Sequence[Wanted], rids: Sequence[str] | None) -> Steps[list[list[Ticket]]]:
        """See `SampleAdmission`. It yields nothing."""
        yield from ()
        return self.open_now(wanted, rids)

    def open_now(self, wanted: Sequence[Wanted], rids: Sequence[str] | None) -> list[list[Ticket]]:
        """The same for the present caller, at once."""
        caller, count = CALLER.get(), sum(job.n for job in wanted)
        self._check_room(count)
        unused = iter(self._check_rids(caller, rids, count))
        self._registry.check_request(job.adapters for job in wanted)
        self._check_priorities(wanted)
        tickets: list[list[Ticket]] = []
        try:
            for job in wanted:
                tickets.append([])
                for number in range(job.n):
                    tickets[-1].append(self._open_one(job, number, caller, unused))
            self._admit(caller, list(itertools.chain(*tickets)))
        except BaseException:
            for ticket in itertools.chain(*tickets):
                self.end(ticket)
            raise
        return tickets

    def submit(self, ticket: Ticket, message: Submit, deliver: Callable[[Output], None]) -> None:
        """See `SampleAdmission`."""
        if self._stopped:
            raise ServerStopping(STOPPING)
        ticket.submitted, ticket.deliver = True, deliver
        ticket.prompt_tokens = len(message.input_ids)
        if ticket.number == 0:
            ticket.grant.charge(ticket.prompt_tokens)
        self._engine.submit(message, partial(self._take, ticket, deliver))
        if ticket.abort_message is not None:
            self._engine.abort(ticket.key, ticket.abort_message)

    def end(self, ticket: Ticket) -> None:
        """See `SampleAdmission`."""
        del self._open[ticket.scope]
        self._let_go(ticket)
        ticket.grant.release()

    def abort(self, rid: str | None, message: str) -> int:
        """See `Front.abort`."""
        caller, found = CALLER.get(), set()
        if rid is None and not caller.admin:
            raise Forbidden("all requests: they are the admin's to abort; name yours", param="rid")
        for (tenant, open_rid), ticket in list(self._open.items()):
            if not caller.admin and tenant != caller.tenant.name:
                continue
            if rid is None or open_rid == rid or open_rid.rpartition("#")[0] == rid:
                ticket.abort_message = message
                if ticket.submitted:
                    self._engine.abort(ticket.key, message)
                found.add((tenant, open_rid.rpartition("#")[0] or open_rid))
        return len(found)

    def stop(self) -> None:
        """The server waits no longer: samples that are there end with ServerStopping, at once and whatever the engine
        does, and no further one is submitted."""
        self._stopped = True
        finished = Finished(type="error", kind="ServerStopping", message=STOPPING)
        for ticket in list(self._open.values()):
            if ticket.deliver is not None:
                ticket.deliver(Output(rid=ticket.key, finished=finished))
                self._engine.abort(ticket.key)

    def _take(self, ticket: Ticket, deliver: Callable[[Output], None], output: Output) -> None:
        if output.finished is not None:
            self._let_go(ticket)
        if output.switch is not None:
            self._switch(ticket, output.switch)  # at once, however slowly the client reads
        elif output.token_ids or output.finished is not None:
            ticket.started = True
            ticket.grant.charge(len(output.token_ids))
        deliver(output)

    def _let_go(self, ticket: Ticket) -> None:
        """The engine has ended its part: however slowly the client reads the rest, its adapters may be unloaded."""
        if not ticket.let_go:
            ticket.let_go = True
            self._registry.release(ticket.held)

    def _switch(self, ticket: Ticket, switch: AdapterSwitch) -> None:
        """The engine goes on with another version of its adapter; what it held may be unloaded then."""
        if not ticket.let_go:
            ticket.held = self._registry.switch(ticket.held, switch.old, switch.new)

    # ------------------------------------------------------------------ the steps of `open`

    def _check_room(self, count: int) -> None:
        if not self._engine.alive:
            raise EngineDead("the engine process ended; restart the server")
        if self._engine.restarting:
            raise EngineRestarting("the engine is being started again; try again later")
        if count > self._room:
            raise BadRequest(f"{count} sequences in one request; the queue holds {self._room}")
        if len(self._open) + count > self._room:
            raise QueueFull(f"the queue is full: {len(self._open)} requests run or wait; try again later")

    def _check_rids(self, caller: Caller, rids: Sequence[str] | None, count: int) -> Sequence[str]:
        if rids is None:
            return [uuid.uuid4().hex for _ in range(count)]
        if len(set(rids)) < count or any(not rid or (caller.tenant.name, rid) in self._open for rid in rids):
            raise BadRequest("rid: each must be unique, not empty and not in use", param="rid")
        check_rid(max(rids, key=len), "rid")
        return rids

    def _check_priorities(self, wanted: Sequence[Wanted]) -> None:
        policy = self._config.schedule_policy
        asked = next((job.priority for job in wanted if job.priority), None)
        if asked is not None and not POLICIES[policy].heeds_priority:
            heeding = " or ".join(name for name, each in POLICIES.items() if each.heeds_priority)
            raise BadRequest(
                f"priority = {asked}: --schedule-policy is {policy}, which orders nothing by it; {heeding} does",
                param="priority",
            )

    def _open_one(self, job: Wanted, number: int, caller: Caller, rids: Iterator[str]) -> Ticket:
        held = self._registry.acquire(job.adapters)
        rid = next(rids)
        key = f"{rid}@{next(self._serial)}"
        ticket = Ticket(rid, key, number, caller, held, self._registry.sole_version(job.adapters))
        self._open[ticket.scope] = ticket
        return ticket

    def _admit(self, caller: Caller, tickets: Sequence[Ticket]) -> None:
        names: list[Collection[str]] = [[ref.name for ref in ticket.held.refs] for ticket in tickets]
        for ticket, grant in zip(tickets, self._quotas.admit(caller, names), strict=True):
            ticket.grant = grant
