import pytest

from multilora.engine.messages import Submit
from multilora.engine.scheduling.policy import LPM_WINDOW, POLICIES
from multilora.engine.scheduling.request import Request, RequestSpec
from multilora.params import SamplingParams


def request(order: int, priority: int | None = None) -> Request:
    number = order if priority is None else priority
    message = Submit(
        rid=str(order), input_ids=[1], sampling=SamplingParams(), tenant="t", priority=number, deadline=9.5
    )
    return Request.of(RequestSpec.of(message, None, seed=0, order=order, arrival=0.0, vocab_size=9))


@pytest.mark.parametrize(("name", "order"), [("fcfs", [0, 1, 2, 3]), ("lpm", [2, 1, 3, 0])])
def test_order(name: str, order: list[int]) -> None:
    waiting = [request(i) for i in range(4)]
    matched = {0: 0, 1: 2, 2: 5, 3: 2}
    policy = POLICIES[name](lambda r: matched[r.spec.order])
    assert [r.spec.order for r in policy.order(waiting)] == order
    assert [r.spec.order for r in waiting] == [0, 1, 2, 3]


def test_lpm_looks_at_a_window() -> None:
    waiting = [request(i) for i in range(LPM_WINDOW + 2)]
    policy = POLICIES["lpm"](lambda r: r.spec.order)
    found = [r.spec.order for r in policy.order(waiting)]
    assert found == [*range(LPM_WINDOW - 1, -1, -1), LPM_WINDOW, LPM_WINDOW + 1]


@pytest.mark.parametrize("name", POLICIES)
def test_the_youngest_is_the_victim(name: str) -> None:
    policy = POLICIES[name](lambda r: 0)
    running = [request(i) for i in (4, 9, 2)]
    for one in running:
        policy.charge(one, 100)
    assert policy.victim(running).spec.order == 9


def test_the_lowest_priority_number_starts_first_and_is_preempted_last() -> None:
    requests = [request(i, priority) for i, priority in enumerate([5, -3, 0, 5, -3])]
    policy = POLICIES["priority"](lambda r: 0)
    assert [r.spec.order for r in policy.order(requests)] == [1, 4, 2, 0, 3]
    running, gone = list(requests), []
    while running:
        gone.append(policy.victim(running))
        running.remove(gone[-1])
    assert [r.spec.order for r in gone] == [3, 2, 4, 1, 0], "the oldest, of the highest number, is the last"


def test_what_policies_may_go_by_travels_with_the_request() -> None:
    spec = request(3).spec
    assert (spec.tenant, spec.priority, spec.deadline) == ("t", 3, 9.5)
