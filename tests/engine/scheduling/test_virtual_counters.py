from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from multilora.engine.scheduling import virtual_counters
from multilora.engine.scheduling.virtual_counters import Competitor, Counters, in_turn


def make(*keys: str, weight: float = 1.0) -> tuple[Counters[str, Competitor], dict[str, Competitor]]:
    counters: Counters[str, Competitor] = Counters(lambda _: Competitor(weight))
    return counters, {key: counters.hold(key) for key in keys}


def test_the_least_served_is_first_and_ties_go_to_who_competes_longest() -> None:
    counters, of = make("a", "b", "c")
    assert counters.first() is None
    for key in "abc":
        counters.enter(of[key])
    assert counters.first() is of["a"]
    of["a"].counter += 5
    assert counters.first() is of["b"]
    counters.leave(of["b"])
    assert counters.first() is of["c"]


def test_who_comes_back_starts_with_the_least_of_those_that_compete() -> None:
    counters, of = make("a", "b", "c")
    counters.enter(of["a"])
    counters.enter(of["b"])
    of["a"].counter, of["b"].counter = 30.0, 20.0
    counters.enter(of["c"])
    assert of["c"].counter == 20.0, "no credit for the time away"
    counters.leave(of["a"])
    of["b"].counter = of["c"].counter = 25.0
    counters.enter(of["a"])
    assert of["a"].counter == 30.0, "nothing is forgiven by leaving"


def test_where_none_competes_a_newcomer_starts_with_the_last_one() -> None:
    counters, of = make("a", "b")
    counters.enter(of["a"])
    of["a"].counter = 50.0
    counters.leave(of["a"])
    of["a"].counter = 70.0  # it still runs
    counters.enter(of["b"])
    assert of["b"].counter == 70.0


def test_those_that_nobody_needs_are_forgotten_but_not_what_they_owe(monkeypatch) -> None:
    monkeypatch.setattr(virtual_counters, "SWEEP", 4)
    counters: Counters[int, Competitor] = Counters(lambda _: Competitor())
    counters._sweep_at = 4
    greedy = counters.hold(-1)
    counters.enter(greedy)
    for i in range(1000):
        one = counters.hold(i)
        counters.enter(one)
        one.counter += 1.0
        counters.leave(one)
        greedy.counter += 1.0
        counters.release(one)
    assert len(counters) < 20
    assert len(counters._heap) < 20
    owing = counters.hold(-2)
    counters.enter(owing)
    owing.counter += 1e6
    counters.leave(owing)
    counters.release(owing)
    counters._sweep()
    assert counters.hold(-2).counter == owing.counter


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=30),
)
def test_in_turn_is_what_serving_one_at_a_time_would_give(weights: list[int], charges: list[tuple[int, int]]) -> None:
    counters: Counters[int, Competitor] = Counters(lambda key: Competitor(float(weights[key])))
    members = [counters.hold(key) for key in range(len(weights))]
    for member in members:
        counters.enter(member)
    for key, amount in charges:
        members[key % len(members)].counter += amount
    cost = 3.0

    def served(member: Competitor):
        key = members.index(member)
        return ((key, cost) for _ in range(4))

    before = [member.counter for member in members]
    found = [key for key, _ in in_turn(counters, served)]
    assert [member.counter for member in members] == before
    assert sorted(found) == sorted(4 * list(range(len(members))))
    level, left = list(before), [4] * len(members)
    for key in found:
        least = min(level[i] for i in range(len(members)) if left[i])
        assert level[key] == least
        level[key] += cost / weights[key]
        left[key] -= 1
    assert [key for key, _ in islice(in_turn(counters, served), 5)] == found[:5], "nothing was changed by looking"
