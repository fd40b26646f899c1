"""The scheduler under thousands of random operations, over the real memory and adapter tiers.

The model is a hash whose state lies in the pages (`tests/support/fakes/engine.py`), so every token that comes out is
checked, and with it pages, prefix cache, fences and adapter places. After every operation the books must balance.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes.drafters import Foreseer
from fakes.engine import EOS, VOCAB, Answer, after, answer, make_engine, only, token_of
from fakes.engine_driver import Stepper
from fakes.tiers import FakeFile, FakeTiers

from multilora.engine.messages import (
    Abort,
    AdapterSwitch,
    Finish,
    Finished,
    FlushCache,
    LoadAdapter,
    Output,
    ReplaceAdapter,
    Reply,
    Submit,
    UnloadAdapter,
)
from multilora.engine.plan import Chunk, StepPlan
from multilora.engine.scheduling.policy import POLICIES
from multilora.engine.scheduling.request import Request, RequestSpec, RequestState
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.engine.scheduling.speculation import Speculation
from multilora.errors import AdapterError
from multilora.memory.cached_block import HOLE
from multilora.memory.kv_group import KVGroup, most_pages
from multilora.memory.page_pool import PageKind
from multilora.params import Composition, SamplingParams

OPERATIONS = 250
CONTEXT = 40  # tokens
GROUPS = (
    (KVGroup(),),
    (KVGroup(), KVGroup(6, columns=2)),
    (KVGroup(),),
    (KVGroup(5),),
    (KVGroup(),),
    (KVGroup(columns=2), KVGroup(9), KVGroup(3)),
)
"""What layers keep of a text, by seed; a block is 4 tokens."""
INVOCATIONS = ((1, 1), (1,), (1, 1, 2))  # prompts are full of ones, so that activation falls anywhere in a page


def acting(request: Request, start: int, end: int) -> tuple[Composition, ...]:
    """Which adapters act on each of the tokens [start, end)."""
    return tuple(
        request.spec.adapters if position >= request.spec.activation else () for position in range(start, end)
    )


class CheckedScheduler(Scheduler):
    """Looks at every plan as it is made."""

    limits: tuple[int, int, int | None]  # running, tokens, adapters
    drafts: bool

    def plan(self) -> StepPlan | None:
        decoding = [
            (r, r.epoch) for r in self.running if r.progress.decoding and not r.at_limit and not r.progress.drafted
        ]
        before = {r: (r.epoch, r.progress.in_flight) for r in self.running + self.waiting}
        plan = super().plan()
        runs = self.steps[plan.number].runs if plan else []
        chunks = {request: c for (request, _), c in zip(runs, plan.chunks if plan else (), strict=True)}
        assert len(chunks) == len(runs), "a request twice in one plan"
        for request, epoch in decoding:
            left_out = request not in chunks and request.epoch == epoch
            held = request.progress.in_flight == 1 and self.drafts
            assert not left_out or request.stalled or held, "a decoding request was left out"
        assert not any(r.stalled for r in chunks)
        self._check_limits(chunks)
        for (request, epoch), chunk in zip(runs, chunks.values(), strict=True):
            assert request.state is RequestState.RUNNING
            assert epoch == request.epoch
            if len(chunk.answer_positions) > 1:
                self._check_draft(request, chunk)
            else:
                self._check_chunk(request, chunk, again=request.epoch > before[request][0])
        slots = [r.slot for r in self.running]
        assert len(slots) == len(set(slots)), "two requests at one slot"
        return plan

    def _check_chunk(self, request: Request, chunk: Chunk, *, again: bool) -> None:
        progress, sampled = request.progress, len(chunk.answer_positions)
        assert chunk.slot == request.slot
        assert progress.num_scheduled == chunk.start + chunk.count
        assert chunk.count >= 1
        assert progress.remaining >= sampled
        assert self.kv.blocks(request.table.pages) * self.kv.page_size >= chunk.start + chunk.count
        assert sampled == (request.spec.samples and progress.remaining == sampled)
        assert chunk.token_ids or (chunk.count == 1 and progress.in_flight == 1 + sampled)
        assert chunk.answer_positions in ((), (len(progress.output_ids) + progress.in_flight - 1,))
        assert chunk.lora_slots == self.components.slots(request.versions)
        assert len(chunk.lora_weights) == len(chunk.lora_slots)
        assert chunk.pre_activation == len(
            [p for p in range(chunk.start, request.spec.activation) if p < chunk.start + chunk.count]
        )
        if again:
            assert progress.in_flight == sampled, "planned again while its token is being sampled"

    def _check_draft(self, request: Request, chunk: Chunk) -> None:
        """A draft follows the last known token, and nothing else is in flight."""
        progress, drafted = request.progress, chunk.count - 1
        known = len(progress.output_ids)
        assert self.drafts
        assert (chunk.slot, chunk.lora_slots) == (request.slot, self.components.slots(request.versions))
        assert (
            progress.num_scheduled
            == chunk.start + chunk.count
            <= self.kv.blocks(request.table.pages) * self.kv.page_size
        )
        assert request.spec.grammar is None
        assert chunk.decodes
        assert chunk.token_ids[0] == request.tokens()[-1] == request.tokens()[chunk.start]
        assert chunk.answer_positions == tuple(range(known, known + chunk.count))
        assert (progress.drafted, progress.in_flight, progress.remaining) == (drafted, chunk.count, 1)
        assert known + chunk.count <= request.spec.max_new_tokens

    def _check_limits(self, chunks: dict[Request, Chunk]) -> None:
        running, tokens, adapters = self.limits
        assert len(self.running) <= running
        assert len(chunks) <= running
        drafted = sum(max(0, len(c.answer_positions) - 1) for c in chunks.values())
        assert sum(c.count for c in chunks.values() if not c.decodes and c.count > 1) + drafted <= tokens
        used = {version for request in chunks for version in request.versions}
        assert adapters is None or len(used) <= adapters


@dataclass
class Client:
    """What the front knows of one request."""

    submit: Submit
    heard: bool = False
    tokens: list[int] = field(default_factory=list)
    input_logprobs: list[float | None] = field(default_factory=list)
    aborted: bool = False
    dropped: bool = False  # `Finish` sent
    ended: Finished | None = None
    switches: list[AdapterSwitch] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.dropped or self.ended is not None


class World(Stepper):
    """A front that does random things to an engine, and knows what must come of them."""

    def __init__(self, seed: int, ahead: bool, drafts: bool = False):
        self.rng = rng = random.Random(seed)
        self.files = {f"/{i}": FakeFile(rank=rng.choice([4, 8, 8, 16, 24])) for i in range(6)}
        self.files |= {f"/a{i}": FakeFile(invocation_tokens=sequence) for i, sequence in enumerate(INVOCATIONS)}
        max_loras = rng.choice([None, 1, 2, 3])
        max_loaded = rng.choice([None, 1, 2, 4])
        if max_loras and max_loaded:
            max_loaded = max(max_loras, max_loaded)
        groups, chunk = GROUPS[seed % len(GROUPS)], rng.choice([3, 8, 64])
        self.tiers = FakeTiers(
            self.files,
            total_pages=rng.choice([14, 20, 40]) * sum(group.columns for group in groups),
            context_pages=most_pages(groups, 4, CONTEXT, 2 * chunk),
            groups=groups,
            max_loras_per_batch=max_loras,
            max_device_pages=rng.choice([None, None, 4, 8]),
            max_loaded_loras=max_loaded,
            max_host_pages=rng.choice([None, None, 5]),
            policy=rng.choice(["lru", "fifo", "cost"]),
            prefix_cache=rng.random() < 0.8,
            fetch_delay=lambda: rng.choice([0, 0, 1, 5]),
            copy_delay=lambda: rng.choice([0, 0, 1, 4]),
        )
        running = rng.choice([1, 3, 8])
        self.now = 0.0
        self.engine = make_engine(
            self.tiers,
            ahead=ahead,
            scheduler=CheckedScheduler,
            max_running=running,
            chunk_tokens=chunk,
            policy=rng.choice(list(POLICIES)),
            clock=lambda: self.now,
            speculation=Speculation(self.foreseer, most=4) if drafts else None,
        )
        self.scheduler = self.engine.scheduler
        self.scheduler.limits, self.scheduler.drafts = (running, chunk, max_loras), drafts
        self.clients: dict[str, Client] = {}
        self.live: dict[str, Client] = {}
        self.loading: dict[int, int] = {}  # call → version
        self.loaded: list[int] = []
        self.path_of: dict[int, str] = {}
        self.unloading: set[int] = set()  # calls
        self.number = 0
        self.stems = [[1] * 20, *([rng.choice([1, rng.randrange(VOCAB)]) for _ in range(20)] for _ in range(2))]

    def foreseer(self, spec: RequestSpec) -> Foreseer:
        right = answer(spec.prompt_ids, spec.adapters, CONTEXT, ignore_eos=True, activation=spec.activation)
        return Foreseer([spec.prompt_ids + right.tokens], self.rng)

    # ------------------------------------------------------------------ operations

    def submit(self) -> None:
        rng = self.rng
        stem = rng.choice(self.stems)[: rng.randrange(20)]
        prompt = stem + [rng.choice([1, rng.randrange(VOCAB)]) for _ in range(rng.randrange(1, 6))]
        logprobs = rng.random() < 0.3
        message = Submit(
            rid=f"r{self.next()}",
            input_ids=prompt,
            sampling=SamplingParams(
                max_new_tokens=rng.choice([0, 1, 3, 10, CONTEXT - len(prompt)]),
                ignore_eos=rng.random() < 0.6,
            ),
            adapters=self.some_adapters(),
            return_logprob=logprobs,
            logprob_start_len=rng.randrange(-1, len(prompt)) if logprobs else -1,
            salt=rng.choice(["", "", "x"]),
            priority=rng.choice([0, 0, -1, 7]),
            grammar=rng.choice([None, None, None, "any"]),  # sampling must see the last token
            tenant=rng.choice("abc"),
        )
        self.clients[message.rid] = self.live[message.rid] = Client(message)
        self.engine.handle(message)

    def some_adapters(self) -> Composition:
        rng = self.rng
        plain = [v for v in self.loaded if not self.invocation_tokens(v)]
        activated = [v for v in self.loaded if self.invocation_tokens(v)]
        kind = rng.random()
        if kind < 0.2 and activated:
            return only(activated[0])  # often the same one, so that its pages are found again
        if kind < 0.6 or len(plain) < 2:
            return only(rng.choice([None, *self.loaded]))
        chosen = rng.sample(plain, k=rng.choice([1, 2, 2, 3]) if len(plain) > 2 else 2)
        return tuple((version, rng.choice([1.0, 0.5, -2.0])) for version in chosen)

    def invocation_tokens(self, version: int) -> tuple[int, ...] | None:
        return self.files[self.path_of[version]].invocation_tokens

    def step(self, count: int = 1) -> None:
        self.now += self.rng.choice([0.0, 0.1, 1.0])
        super().step(count)

    def after_step(self) -> None:
        known = {r.rid for r in self.scheduler.running + self.scheduler.waiting}
        assert known == set(self.live), "a request is lost"

    def abort(self) -> None:
        if self.live:
            client = self.rng.choice(list(self.live.values()))
            client.aborted = True
            self.engine.handle(Abort(client.submit.rid))

    def finish(self) -> None:
        if self.live:
            client = self.rng.choice(list(self.live.values()))
            refused = self.scheduler.get(client.submit.rid) is None  # its ending is on the way
            if not client.aborted and not refused:
                client.dropped = True
                del self.live[client.submit.rid]
                self.engine.handle(Finish(client.submit.rid))

    def load(self) -> None:
        call, version = self.next(), self.next()
        self.loading[call] = version
        path = self.path_of[version] = self.rng.choice([*self.files, "/missing"])
        pinned = self.rng.random() < 0.2
        self.engine.handle(LoadAdapter(call=call, version=version, path=path, pinned=pinned))

    def unload(self) -> None:
        used = {version for c in self.live.values() for version, _ in c.submit.adapters}
        idle = [v for v in self.loaded if v not in used]
        if idle:
            version, call = self.rng.choice(idle), self.next()
            self.loaded.remove(version)
            self.unloading.add(call)
            self.engine.handle(UnloadAdapter(call, version))

    def replace(self) -> None:
        """New requests do not ask for the old version any more; it is unloaded when the engine has none on it."""
        if len(self.loaded) > 1:
            old, new = sorted(self.rng.sample(self.loaded, k=2))
            self.loaded.remove(old)
            self.unloading |= {first := self.next(), second := self.next()}
            self.engine.handle(ReplaceAdapter(first, old, new))
            self.engine.handle(UnloadAdapter(second, old))

    def flush(self) -> None:
        self.unloading.add(call := self.next())
        self.engine.handle(FlushCache(call))

    def break_or_mend_a_file(self) -> None:
        file = self.rng.choice(list(self.files.values()))
        if self.rng.random() < 0.5:
            file.error = AdapterError("the disk is gone") if file.error is None else None
        else:
            file.fingerprint = self.rng.choice(["as written", "changed"])

    def next(self) -> int:
        self.number += 1
        return self.number

    # ------------------------------------------------------------------ what comes back

    def reply(self, reply: Reply) -> None:
        if reply.call in self.unloading:
            assert reply.ok
            self.unloading.remove(reply.call)
        elif reply.ok:
            self.loaded.append(self.loading.pop(reply.call))
        else:
            assert reply.kind.startswith("Adapter")
            del self.loading[reply.call]

    def take(self, output: Output) -> None:
        client = self.clients[output.rid]
        assert not client.over, f"{output.rid} hears something after its end"
        if output.switch is not None:
            assert not client.heard or output.switch.start > 0
            client.switches.append(output.switch)
            return
        if client.heard:
            assert not output.input_logprobs
        client.heard = True
        client.input_logprobs += [x and x.logprob for x in output.input_logprobs]
        client.tokens += output.token_ids
        if output.finished is not None:
            client.ended = output.finished
            del self.live[output.rid]
        self.check_client(client)

    def right_answer(self, message: Submit) -> Answer:
        adapters, activation = message.adapters, 0
        sequence = self.invocation_tokens(adapters[0][0]) if len(adapters) == 1 else None
        if sequence is not None:
            prompt = message.input_ids
            starts = [i for i in range(len(prompt)) if tuple(prompt[i : i + len(sequence)]) == sequence]
            adapters, activation = (adapters, starts[-1]) if starts else ((), 0)
        sampling = message.sampling
        return answer(message.input_ids, adapters, sampling.max_new_tokens or 0, sampling.ignore_eos, activation)

    def check_switched(self, client: Client) -> None:
        """The tokens before a switch are the old version's. After it the KV is that of both, or, if the request was
        preempted since, the new one's alone."""
        message, tokens, switches = client.submit, client.tokens, list(client.switches)
        adapters, states = message.adapters, {0}
        for token in message.input_ids[:-1]:
            states = {after(state, token, adapters) for state in states}
        for i, token in enumerate(tokens):
            known = message.input_ids + tokens[:i]
            while switches and switches[0].start <= i:
                switch = switches.pop(0)
                adapters = tuple((switch.new if v == switch.old else v, weight) for v, weight in adapters)
            anew = 0
            for one in known[:-1] if client.switches[0].start <= i else ():
                anew = after(anew, one, adapters)
            states = {after(state, known[-1], adapters) for state in (states | {anew} if anew else states)}
            states = {state for state in states if token_of(state) == token}
            assert states, (i, client)

    def check_client(self, client: Client) -> None:
        if client.switches:
            if not any(self.invocation_tokens(v) for v, _ in client.submit.adapters):
                self.check_switched(client)
            return
        message, ended = client.submit, client.ended
        right = self.right_answer(message)
        assert client.tokens == right.tokens[: len(client.tokens)]
        start = message.logprob_start_len
        if message.return_logprob and start >= 0 and client.tokens:
            assert client.input_logprobs == [None, *right.prompt_logprobs][start:]
        if ended is None:
            return
        if ended.type in ("stop", "length"):
            assert (client.tokens, ended.type) == (right.tokens, right.finish)
            assert ended.matched == (EOS if ended.type == "stop" else None)
        elif ended.type == "abort":
            assert client.aborted
        else:
            assert message.adapters or ended.kind == "CannotFit"
            assert ended.kind in ("AdapterUnavailable", "CannotFit")

    # ------------------------------------------------------------------ invariants

    def check(self) -> None:
        self.tiers.check()
        pool = self.tiers.pool
        assert sum(pool.count(kind) for kind in PageKind) == pool.total
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert all(not r.table.pages for r in waiting)
        assert [r.spec.order for r in waiting] == sorted(r.spec.order for r in waiting)
        self.check_pages(running)
        users = Counter(version for r in running for version in r.versions)
        queued = Counter(version for r in waiting for version in r.versions)
        for version in [*self.loaded, *users, *queued]:
            adapter = self.tiers.store.get(version)
            assert (adapter.refs, adapter.waiting) == (users[version], queued[version])
            assert adapter.queued_demand <= adapter.waiting
            assert not users[version] or self.tiers.weights_are(version, adapter.slot)

    def check_pages(self, running: list[Request]) -> None:
        """Only full pages are shared, at the same place, and the cache knows by how many."""
        holders: dict[int, list[tuple[Request, int]]] = {}
        mixed: set[int] = set()
        for request in running:
            for at, page in enumerate(request.table.pages):
                i = at // self.tiers.prefix.columns
                if page == HOLE:
                    continue
                if not request.mixed:
                    holders.setdefault(page, []).append((request, i))
                else:
                    mixed.add(page)
        assert len(holders.keys() | mixed) == self.tiers.pool.count(PageKind.KV)
        nodes = self.tiers.prefix._by_page
        for page, held in holders.items():
            if page in nodes:
                [refs] = [part.refs for part in nodes[page].parts if page in part.pages]
                assert refs == len(held) or page in mixed
                assert len({(i, acting(r, i * 4, i * 4 + 4)) for r, i in held}) == 1
                assert len({tuple(acting(r, 0, i * 4)) for r, i in held}) == 1
                assert all((i + 1) * 4 <= r.progress.num_computed for r, i in held)
            else:
                assert len(held) == 1 and page not in mixed

    # ------------------------------------------------------------------ a life

    OPERATIONS = (
        (step, 55),
        (submit, 25),
        (load, 4),
        (unload, 2),
        (replace, 2),
        (abort, 3),
        (finish, 3),
        (break_or_mend_a_file, 2),
        (flush, 1),
    )

    def live_through(self, operations: int) -> None:
        names = [operation for operation, _ in self.OPERATIONS]
        weights = [weight for _, weight in self.OPERATIONS]
        for operation in self.rng.choices(names, weights, k=operations):
            operation(self)
            self.check()

    def drain(self) -> None:
        """Nothing new comes: all must end, in a number of steps that their tokens bound."""
        work = sum(len(c.submit.input_ids) + (c.submit.sampling.max_new_tokens or 0) for c in self.live.values())
        for _ in range(100 + 10 * work):
            if not self.engine.busy:
                break
            self.step()
        assert not self.live, "no progress"
        assert not self.loading
        assert not self.unloading
        for adapter in self.tiers.store.loaded():
            assert adapter.waiting == adapter.queued_demand == 0, "nothing waits for it any more"
        for version in list(self.loaded):
            self.engine.handle(UnloadAdapter(self.next(), version))
        self.engine.handle(FlushCache(self.next()))
        for _ in range(10):  # copies of unloaded adapters come to their end
            self.tiers.store.poll_loads(self.scheduler.launched)
        self.tiers.check()
        assert self.tiers.pool.free == self.tiers.pool.total
        assert len(self.tiers.host) == 0


def lives() -> Iterator[Any]:
    """An eighth of them is enough in the quick tier, and fewer with drafts."""
    for seed in (*range(24), 134):  # 134: preempted while its prompt's last chunk is computed
        for ahead in (False, True):
            for drafts in (False, True):
                names = ("one step ahead" if ahead else "in turn", *(["with drafts"] if drafts else []))
                quick = seed < (1 if drafts else 3) or (seed == 134 and not drafts)
                marks = () if quick else pytest.mark.slow
                yield pytest.param(seed, ahead, drafts, id="-".join([str(seed), *names]), marks=marks)


@pytest.mark.parametrize(("seed", "ahead", "drafts"), [*lives()])
def test_random_operations(seed: int, ahead: bool, drafts: bool) -> None:
    world = World(seed, ahead, drafts)
    world.live_through(OPERATIONS)
    world.drain()
    assert all(c.over for c in world.clients.values())
