"""The two ends of a worker's socket: questions, outputs, names in their order, and what is left when one end is gone.

Covers `workers/desk.py`, `workers/names.py`, `workers/process.py` too.
"""

import asyncio
from functools import partial

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run

from multilora.drivers.workers.desk import Desk
from multilora.drivers.workers.link import NamesQueue, SupervisorLink
from multilora.drivers.workers.names import NamesFeed
from multilora.drivers.workers.process import WorkerProcess
from multilora.errors import EngineDead, RateLimited
from multilora.front.access import OPERATOR, Caller, Limits
from multilora.front.admission import Wanted
from multilora.front.workers.messages import (
    Abort,
    Answer,
    EndSample,
    Finish,
    HoldAdapters,
    JoinNames,
    NamesApplied,
    NamesChanged,
    OpenSamples,
    Relayed,
    ReleaseAdapters,
    Submit,
    TakeRequest,
    Welcome,
    decode_from_worker,
    encode,
)
from multilora.params import SamplingParams
from multilora.tracing import TraceSpan, current_traceparent, spanning


class Wire:
    """Stands where a ZeroMQ socket stands. sent: decoded; `say` puts what is received."""

    def __init__(self):
        self.sent = []
        self._incoming = asyncio.Queue()

    def send(self, data):
        self.sent.append(decode_from_worker(data))

    def say(self, message):
        self._incoming.put_nowait(encode(message))

    async def recv(self):
        return await self._incoming.get()


def names(seq):
    return NamesChanged(seq=seq, rows=[], weight_version="default")


def link_on(wire, seq=0):
    server = LocalServer(FakeEngineClient(), None)
    welcome = Welcome(config=server.config, ready=server.client.ready, names=names(seq), relay="/r")
    return SupervisorLink(wire, welcome)


class Front:
    """Of a worker; notes which changes are applied."""

    def __init__(self):
        self.applied = []

    def unread(self, change):
        return ()

    def apply(self, change):
        self.applied.append(change.seq)


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def test_a_question_waits_for_the_names_that_its_answer_is_about():
    async def scenario():
        wire, front = Wire(), Front()
        link = link_on(wire)
        receiving = asyncio.create_task(link.receive(front, None, lambda message: None))
        asking = asyncio.create_task(link.ask(lambda call: TakeRequest(call=call, caller=OPERATOR)))
        await until(lambda: wire.sent)
        wire.say(Answer(call=1, seq=2))
        wire.say(names(1))
        await until(lambda: front.applied == [1])
        await asyncio.sleep(0.01)
        assert not asking.done()
        wire.say(names(2))
        assert (await asking).seq == 2 and wire.sent[-2:] == [NamesApplied(1), NamesApplied(2)]
        receiving.cancel()

    run(scenario())


def test_the_error_of_an_answer_keeps_what_it_says():
    async def scenario():
        wire = Wire()
        link = link_on(wire)
        receiving = asyncio.create_task(link.receive(Front(), None, lambda message: None))
        wire.say(Answer(call=1, kind="RateLimited", message="too much", param="x", retry_after=17))
        with pytest.raises(RateLimited, match="too much") as raised:
            await link.ask(lambda call: TakeRequest(call=call, caller=OPERATOR))
        assert (raised.value.retry_after, raised.value.param) == (17, "x")
        receiving.cancel()

    run(scenario())


def test_the_answer_of_a_question_that_is_cancelled_is_undone():
    async def scenario():
        wire, undone = Wire(), []
        link = link_on(wire)
        receiving = asyncio.create_task(link.receive(Front(), None, lambda message: None))
        asking = asyncio.create_task(link.ask(lambda call: TakeRequest(call=call, caller=OPERATOR), undone.append))
        await until(lambda: wire.sent)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        wire.say(Answer(call=1, hold=3))
        await until(lambda: undone)
        assert undone == [Answer(call=1, hold=3)]
        receiving.cancel()

    run(scenario())


def test_a_worker_begins_with_the_names_of_its_welcome():
    run(asyncio.wait_for(NamesQueue(4).applied(4), 1))


class Supervisor(LocalServer):
    """With one desk; `sent`: what it has said to its worker."""

    def __init__(self, **config):
        super().__init__(FakeEngineClient(), None, **config)
        self.sent = []
        self.feed = NamesFeed(self.registry)
        self.desk = Desk(self.driver, self.sent.append, lambda observed: None)
        self.feed.add(self.desk, self.sent.append)

    def open(self, *adapters, rids=None, caller=OPERATOR):
        wanted = [Wanted(tuple((name, 1.0) for name in adapters))]
        self.desk.take(OpenSamples(call=1, caller=caller, wanted=wanted, rids=rids))
        return self.sent[-1]


def submit(row):
    sampling = SamplingParams(max_new_tokens=2)
    return Submit(rid=row.key, input_ids=[5, 6], sampling=sampling, adapters=row.composition)


def test_outputs_of_one_turn_are_one_message():
    async def scenario():
        s = Supervisor()
        rows = [s.open().samples[0][0] for _ in range(2)]
        for row in rows:
            s.desk.take(submit(row))
        await until(
            lambda: sum(o.finished is not None for m in s.sent if isinstance(m, Relayed) for o in m.items) == 2
        )
        relayed = [message for message in s.sent if isinstance(message, Relayed)]
        assert max(len(message.items) for message in relayed) == 2
        for row in rows:
            s.desk.take(EndSample(row.key))
        assert s.driver.front.in_flight == 0

    run(scenario())


def test_a_worker_that_is_gone_holds_nothing(tmp_path):
    async def scenario():
        s = Supervisor(lora_resolver_dir=(str(tmp_path),))
        await s.load_from("a", "/adapters/a")
        s.client.gate.clear()
        running, waiting = s.open("a").samples[0][0], s.open("a").samples[0][0]
        s.desk.take(submit(running))
        s.desk.take(HoldAdapters(call=9, caller=OPERATOR, names=["a"]))
        await until(lambda: Answer(call=9, seq=s.desk.seq, hold=1) in s.sent)
        s.desk.close()
        assert s.client.aborted == [running.key] and waiting.key != running.key
        assert s.driver.front.in_flight == 0 and s.registry.num_requests(1) == 0
        before = len(s.sent)
        await asyncio.sleep(0.01)
        assert len(s.sent) == before

    run(scenario())


def test_what_a_worker_says_of_its_requests_reaches_the_engine():
    async def scenario():
        s = Supervisor()
        s.client.gate.clear()
        one, two = s.open().samples[0][0], s.open().samples[0][0]
        for row in (one, two):
            s.desk.take(submit(row))
        s.desk.take(Abort(one.key, "why"))
        s.desk.take(Finish(two.key))
        assert s.client.aborted == [one.key] and s.client.finished == [two.key]
        s.driver.stop()
        late = s.open().samples[0][0]
        s.desk.take(submit(late))
        await until(lambda: any(isinstance(m, Relayed) and m.items[-1].rid == late.key for m in s.sent))
        assert s.sent[-1].items[-1].finished.kind == "ServerStopping"
        for row in (one, two, late):
            s.desk.take(EndSample(row.key))

    run(scenario())


def test_refusals_are_answers():
    async def scenario():
        s = Supervisor()
        assert s.open("nobody").kind == "UnknownAdapter"
        assert s.open(rids=["r"]).samples[0][0].rid == "r"
        assert s.open(rids=["r"]).kind == "BadRequest"
        few = Caller(key_id="few", limits=Limits(requests_per_minute=1))
        for expected in ("", "RateLimited"):
            s.desk.take(TakeRequest(call=2, caller=few))
            assert s.sent[-1].kind == expected
        assert s.sent[-1].retry_after >= 1
        s.desk.take(HoldAdapters(call=3, caller=OPERATOR, names=["x"]))
        await until(lambda: s.sent[-1].call == 3)
        s.desk.take(ReleaseAdapters(s.sent[-1].hold))

    run(scenario())


def test_a_hold_is_traced_below_the_workers_span():
    async def scenario():
        s = Supervisor()
        records, seen = [], []

        async def hold(names):
            with spanning("load_adapter"):
                seen.append(current_traceparent())
            return []

        s.driver.hold = hold
        above = TraceSpan("llm", "front", print, "4bf92f3577b34da6a3ce929d0e0e4736").context
        asked = partial(HoldAdapters, caller=OPERATOR, names=["x"])
        s.desk.take(asked(call=1, traceparent=above.traceparent))
        await until(lambda: s.sent)
        assert seen == [None]  # nobody traces
        s.driver.export_span = records.append
        for call, header in ((2, None), (3, above.traceparent)):
            s.desk.take(asked(call=call, traceparent=header))
            await until(lambda: s.sent[-1].call == call)  # noqa: B023
        (record,) = records
        assert (record.trace_id, record.parent_id) == (above.trace_id, above.span_id)
        assert seen == [None, None, f"00-{record.trace_id}-{record.span_id}-01"]

    run(scenario())


def test_changes_wait_for_those_that_have_joined_only():
    async def scenario():
        s = Supervisor()
        await s.load_from("a", "/adapters/a")
        assert await s.feed.settled(0) == []
        s.desk.take(JoinNames(5))
        assert s.sent[-1] == Answer(call=5, seq=1)
        await s.load_from("b", "/adapters/b")
        assert await s.feed.settled(0.01) == [s.desk]
        s.desk.take(NamesApplied(2))
        assert await s.feed.settled(0) == []
        s.feed.remove(s.desk)
        await s.load_from("c", "/adapters/c")
        assert await s.feed.settled(0) == []
        assert [row.name for row in s.feed.snapshot().rows] == ["a", "b", "c"]

    run(scenario())


def test_a_process_that_ends_before_it_serves_says_so(tmp_path):
    async def scenario():
        s = Supervisor()
        welcome = partial(Welcome, config=s.config, ready=s.client.ready, names=names(0), relay="/r")
        start = partial(WorkerProcess.start, "front-1", "no_such_module", 0, tmp_path, welcome, s.driver, s.feed)
        with pytest.raises(EngineDead, match="front-1 ended with code 1 before it served"):
            await start(lambda observed: None, heartbeat=4)

    run(scenario())
