"""The policy `fair`: its order and victims, the bounds that it promises, and a greedy tenant beside modest ones."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from fakes.timed_engine import Timed
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tenant_trace import ADAPTERS, Arrival, modest_only, p99, trace
from multilora.engine.messages import Submit
from multilora.engine.scheduling import fair
from multilora.engine.scheduling.fair import EQUAL, FairShare, FairWeights
from multilora.engine.scheduling.request import Request, RequestSpec
from multilora.params import SamplingParams


def request(order: int, tenant: str, prompt: int = 10, adapter: int = 0, arrival: float = 0.0, priority: int = 0):
    message = Submit(
        rid=str(order),
        input_ids=[1] * prompt,
        sampling=SamplingParams(max_new_tokens=5),
        adapters=((adapter, 1.0),) if adapter else (),
        tenant=tenant,
        priority=priority,
    )
    return Request.of(RequestSpec.of(message, None, seed=0, order=order, arrival=arrival, vocab_size=9))


def policy(weights: FairWeights = EQUAL) -> FairShare:
    return FairShare(lambda _: 0, 5.0, weights)


def order_of(fair_share: FairShare, waiting: Sequence[Request], now: float = 0.0) -> list[int]:
    window = fair_share.window(waiting, now, starting=True)
    return [r.spec.order for r in fair_share.order(window)]


def run(fair_share: FairShare, one: Request, tokens: int) -> None:
    one.progress.num_scheduled += tokens
    fair_share.charge(one, tokens)


def start(share: FairShare, requests: Sequence[Request]) -> None:
    """All of them wait, then all of them run their prompts."""
    for one in requests:
        share.enqueue(one)
    for one in requests:
        share.dequeue(one)
        run(share, one, len(one.spec.prompt_ids))


# ---------------------------------------------------------------------- order, charges, victims


def test_who_is_served_elsewhere_goes_behind_here_too() -> None:
    share = policy(FairWeights(tenants={"greedy": 2.0}))
    running = request(0, "modest", prompt=30)
    start(share, [running])
    assert share.take_served() == {"modest": 30.0 + 2.0}  # its prompt, and the first token that it brings
    assert share.take_served() == {}
    waiting = [request(1, "greedy"), request(2, "modest")]
    share.charge_elsewhere({"greedy": 70.0, "nobody": 1.0})
    for one in reversed(waiting):
        share.enqueue(one)
    assert order_of(share, waiting) == [2, 1]  # 32 against 70 / 2
    share.charge_elsewhere({"modest": 10.0})
    assert order_of(share, waiting) == [1, 2]
    share.charge_elsewhere({"greedy": 1e9})
    share.charge_elsewhere({"modest": fair.MOST_OWED - 100})  # what greedy owes is bounded
    assert order_of(share, waiting) == [2, 1]
    share.charge_elsewhere({"modest": 200.0})
    assert order_of(share, waiting) == [1, 2]
    assert share.take_served() == {}


def test_tenants_take_turns_by_what_they_ask_for() -> None:
    waiting = [request(i, "a", prompt=100) for i in range(4)] + [request(4 + i, "b", prompt=50) for i in range(4)]
    share = policy()
    for one in waiting:
        share.enqueue(one)
    assert order_of(share, waiting) == [0, 4, 5, 1, 6, 7, 2, 3]


def test_adapters_take_turns_within_a_tenant() -> None:
    waiting = [request(i, "", adapter=1) for i in range(3)] + [request(3, "", adapter=2), request(4, "")]
    share = policy()
    for one in waiting:
        share.enqueue(one)
    assert order_of(share, waiting) == [0, 3, 4, 1, 2]


def test_priorities_count_within_the_adapter_of_a_tenant() -> None:
    waiting = [request(0, "a", priority=5), request(1, "a", priority=-1), request(2, "b", priority=9)]
    share = policy()
    for one in waiting:
        share.enqueue(one)
    assert order_of(share, waiting) == [1, 2, 0]


def test_tokens_are_charged_once_by_their_weights() -> None:
    share = policy(FairWeights(input=3.0, output=5.0, tenants={"a": 2.0}))
    one = request(0, "a", prompt=10)
    share.enqueue(one)
    share.dequeue(one)
    one.progress.num_scheduled = 4  # found in the prefix cache
    run(share, one, 3)
    counter = lambda: share._tenants.get("a").counter  # noqa: E731
    assert counter() == 3 * 3.0 / 2
    run(share, one, 3)
    assert counter() == (6 * 3.0 + 5.0) / 2, "the prompt's last token brings the first of the answer"
    run(share, one, 1)
    run(share, one, 1)
    paid = counter()
    assert paid == (6 * 3.0 + 3 * 5.0) / 2
    share.enqueue(one)  # preempted
    share.dequeue(one)
    one.progress.num_scheduled = 0
    run(share, one, 12)
    assert counter() == paid, "what is computed again costs nothing"
    run(share, one, 1)
    assert counter() == paid + 5.0 / 2


def test_the_youngest_of_the_most_served_tenant_is_preempted_but_never_the_oldest() -> None:
    share = policy()
    running = [request(0, "a"), request(1, "b"), request(2, "a"), request(3, "b"), request(4, "c")]
    start(share, running)
    run(share, running[0], 1)
    gone = []
    while running:
        gone.append(share.victim(running))
        running.remove(gone[-1])
    assert [r.spec.order for r in gone] == [2, 3, 1, 4, 0]


@pytest.mark.parametrize(("of_a", "freed"), [(3, False), (5, True)])
def test_a_slot_is_freed_only_where_one_tenant_has_far_more(of_a: int, freed: bool) -> None:
    share = policy()
    running = [request(i, "a") for i in range(of_a)] + [request(of_a, "b")]
    start(share, running)
    waiting = request(9, "b")
    share.enqueue(waiting)
    victim = share.outranked(waiting, running)
    assert (victim is not None and victim.spec.order == of_a - 1) if freed else victim is None


def test_a_request_of_age_goes_first_now_and_then() -> None:
    share = policy(FairWeights(tenants={"light": 1e-3}))
    old, *waiting = [request(0, "light"), request(1, "light"), *(request(i, "heavy") for i in range(2, 40))]
    for one in (old, *waiting):
        share.enqueue(one)
    share.dequeue(old)
    run(share, old, 10)  # its tenant has got more than its share for long
    started: list[int] = []
    while waiting:
        first = order_of(share, waiting, now=100.0)[0]
        started.append(first)
        one = next(r for r in waiting if r.spec.order == first)
        waiting.remove(one)
        share.dequeue(one)
        run(share, one, 10)
    assert started.index(1) == fair.AGED_TURN - 1, "one has started before"


# ---------------------------------------------------------------------- what it promises

SIZES = st.tuples(st.integers(1, 50), st.integers(1, 20))  # prompt, answer


@given(
    a=st.lists(SIZES, min_size=1, max_size=8),
    b=st.lists(SIZES, min_size=1, max_size=8),
    slots=st.integers(1, 6),
    weights=st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([1.0, 2.0, 4.0])),
)
@settings(deadline=None, max_examples=60)
def test_the_service_of_two_that_always_wait_differs_by_a_bound(a, b, slots, weights) -> None:
    """Theorem 4.4 of the VTC paper: 2 max(w_p x longest prompt, w_q x tokens of a full batch)."""
    share = policy(FairWeights(input=weights[0], output=weights[1]))
    answers: dict[Request, int] = {}
    running: list[Request] = []
    waiting: list[Request] = []
    service: Counter[str] = Counter()
    sizes = {"a": a, "b": b}
    made: Counter[str] = Counter()

    def refill() -> None:
        for tenant in "ab":
            while sum(r.spec.tenant == tenant for r in waiting) < slots + 1:
                prompt, answer = sizes[tenant][made[tenant] % len(sizes[tenant])]
                made[tenant] += 1
                one = request(made.total(), tenant, prompt)
                answers[one] = answer
                waiting.append(one)
                share.enqueue(one)

    longest = max(prompt for prompt, _ in a + b)
    most = slots * max(prompt + answer for prompt, answer in a + b)
    bound = 2 * max(weights[0] * longest, weights[1] * most)
    for _ in range(150):
        refill()
        free = slots - len(running)
        if free:
            window = share.window(waiting, 0.0, starting=True)
            for one in [r for r, _ in zip(share.order(window), range(free), strict=False)]:
                waiting.remove(one)
                share.dequeue(one)
                running.append(one)
        assert len(running) == slots, "no slot stays empty while somebody waits"
        for one in list(running):
            count = 1 if one.progress.num_scheduled else len(one.spec.prompt_ids)
            run(share, one, count)
            reads = one.progress.num_scheduled <= len(one.spec.prompt_ids)
            service[one.spec.tenant] += weights[1] + (weights[0] * count if reads else 0)
            answers[one] -= 1
            if answers[one] <= 0:
                running.remove(one)
                share.forget(one)
        counters = [share._tenants.get(tenant).counter for tenant in "ab"]
        assert all(math.isfinite(counter) for counter in counters)
        assert abs(service["a"] - service["b"]) <= bound


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3), SIZES), min_size=1, max_size=60),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=60)
def test_every_order_has_everybody_once_whatever_comes_and_leaves(arrivals, rng) -> None:
    share = policy()
    waiting: list[Request] = []
    running: list[Request] = []
    for number, (tenant, adapter, (prompt, _)) in enumerate(arrivals):
        waiting.append(one := request(number, tenant, prompt, adapter))
        share.enqueue(one)
        found = order_of(share, waiting)
        assert sorted(found) == [r.spec.order for r in waiting]
        window = [r.spec.order for r in share.window(waiting, 0.0, starting=rng.random() < 0.5)]
        assert set(window) <= {r.spec.order for r in waiting}
        for one in rng.sample(waiting, k=rng.randrange(len(waiting))):
            waiting.remove(one)
            share.dequeue(one)
            running.append(one)
            run(share, one, len(one.spec.prompt_ids))
        for one in rng.sample(running, k=rng.randrange(len(running) + 1)):
            running.remove(one)
            if rng.random() < 0.5:
                share.forget(one)
            else:  # preempted
                waiting.append(one)
                waiting.sort(key=lambda r: r.spec.order)
                share.enqueue(one)
    for one in waiting:
        share.dequeue(one)
        share.forget(one)
    for one in running:
        share.forget(one)
    assert not share._accounts
    assert share._tenants.first() is None
    assert all(tenant.held == tenant.running == tenant.waiting == 0 for tenant in share._tenants._members.values())


# ---------------------------------------------------------------------- a greedy tenant and nine modest ones

RATE = {"greedy_rate": 80.0, "modest_rate": 2.0}  # an engine of such steps serves about 50 requests a second


def step_seconds(prompt_tokens: int) -> float:
    return 0.008 + 0.00004 * prompt_tokens


class Server(Timed):
    """An engine of 32 slots with all adapters in host memory. Its books are checked at the end only."""

    def __init__(self, name: str):
        super().__init__(
            step_seconds, ADAPTERS, policy=name, max_running=32, chunk_tokens=2048, total_pages=1024, page_size=16,
            copy_seconds=0.002, max_unfinished=10_000,
        )  # fmt: skip

    def check(self) -> None:
        """Nothing: a check looks at every page, too slow for each of hundreds of steps."""

    def replay(self, arrivals: Sequence[Arrival]) -> tuple[list[float], float]:
        """Seconds to first tokens of the modest tenants' requests, and until all requests have ended."""
        start, came = self.now, 0
        while came < len(arrivals) or self.engine.busy:
            while came < len(arrivals) and start + arrivals[came].seconds <= self.now:
                one = arrivals[came]
                self.submit(str(came), one.adapter + 1, one.answer, prompt=one.prompt, tenant=one.tenant)
                came += 1
            self.step()
        assert all(len(self.tokens[str(i)]) == one.answer for i, one in enumerate(arrivals))
        self.engine.check()
        first = [self.first[str(i)] - start - one.seconds for i, one in enumerate(arrivals) if not one.greedy]
        return first, self.now - start


@pytest.mark.slow
def test_a_greedy_tenant_does_not_keep_modest_ones_waiting() -> None:
    arrivals = trace(3.0, **RATE)
    alone, _ = Server("fcfs").replay(modest_only(arrivals))
    first, seconds = Server("fair").replay(arrivals)
    behind, unfair_seconds = Server("fcfs").replay(arrivals)
    assert p99(first) <= 2 * p99(alone)
    assert p99(behind) > 20 * p99(alone), "the trace floods a server that is not fair"
    assert seconds <= unfair_seconds / 0.97
