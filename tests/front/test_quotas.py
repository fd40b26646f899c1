"""Token buckets and concurrency, by a clock that stands until it is moved."""

import pytest

from multilora.errors import BadRequest, RateLimited
from multilora.front import quotas as module
from multilora.front.access import OPERATOR, Caller, Limits
from multilora.front.quotas import UNLIMITED, Quotas


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(clock)


def caller(**limits: int) -> Caller:
    return Caller(key_id="k", limits=Limits(**limits))


def test_without_limits_nothing_is_kept(quotas: Quotas) -> None:
    quotas.take_request(OPERATOR)
    assert quotas.admit(OPERATOR, [["a"], []]) == [UNLIMITED, UNLIMITED]
    assert not quotas._accounts


def test_requests_a_minute(quotas: Quotas, clock: Clock) -> None:
    key = caller(requests_per_minute=6)
    for _ in range(6):
        quotas.take_request(key)
    with pytest.raises(RateLimited, match="key 'k' has used up its 6 requests a minute") as caught:
        quotas.take_request(key)
    assert caught.value.retry_after == 10
    clock.now += 9.9
    with pytest.raises(RateLimited) as caught:
        quotas.take_request(key)
    assert caught.value.retry_after == 1
    clock.now += 0.2
    quotas.take_request(key)
    clock.now += 3600
    for _ in range(6):
        quotas.take_request(key)
    with pytest.raises(RateLimited):
        quotas.take_request(key)


def test_a_refused_request_costs_nothing(quotas: Quotas, clock: Clock) -> None:
    key = caller(requests_per_minute=60)
    for _ in range(60):
        quotas.take_request(key)
    for _ in range(100):
        with pytest.raises(RateLimited):
            quotas.take_request(key)
    clock.now += 1.01
    quotas.take_request(key)


def test_tokens_a_minute(quotas: Quotas, clock: Clock) -> None:
    """What runs may overdraw; the next one waits until that is made up for."""
    key = caller(tokens_per_minute=60)
    (grant,) = quotas.admit(key, [[]])
    grant.charge(59)
    (other,) = quotas.admit(key, [[]])
    other.charge(31)
    with pytest.raises(RateLimited, match="60 tokens a minute") as caught:
        quotas.admit(key, [[]])
    assert caught.value.retry_after == 31
    clock.now += 31
    quotas.admit(key, [[]])


def test_concurrency(quotas: Quotas) -> None:
    key = caller(concurrency=3)
    first = quotas.admit(key, [[], []])
    with pytest.raises(RateLimited, match="has 2 sequences running, 3 at most"):
        quotas.admit(key, [[], []])
    (third,) = quotas.admit(key, [[]])
    with pytest.raises(RateLimited):
        quotas.admit(key, [[]])
    third.release()
    first[0].release()
    quotas.admit(key, [[], []])
    with pytest.raises(BadRequest, match="4 sequences in one request"):
        quotas.admit(key, [[]] * 4)


def test_adapters_have_limits_of_their_own(quotas: Quotas, clock: Clock) -> None:
    quotas.adapters = [("sql-*", Limits(concurrency=1)), ("*:*", Limits(requests_per_minute=1)), ("s*", Limits())]
    quotas.admit(OPERATOR, [["sql-1"]])
    quotas.admit(OPERATOR, [["sql-2"]])
    with pytest.raises(RateLimited, match="adapter 'sql-1'"):
        quotas.admit(OPERATOR, [["sql-1"]])
    with pytest.raises(RateLimited, match="adapter 'sql-1'"):
        quotas.admit(OPERATOR, [["x"], ["sql-1", "x"]])
    quotas.admit(OPERATOR, [["acme:a"], ["acme:a"]])  # one request, of two samples
    with pytest.raises(RateLimited, match="1 requests a minute"):
        quotas.admit(OPERATOR, [["acme:a"]])
    clock.now += 60
    quotas.admit(OPERATOR, [["acme:a"]])


def test_what_is_refused_takes_nothing(quotas: Quotas) -> None:
    quotas.adapters = [("full", Limits(concurrency=1)), ("*", Limits(concurrency=1, requests_per_minute=1))]
    quotas.admit(OPERATOR, [["full"]])
    with pytest.raises(RateLimited, match="'full'"):
        quotas.admit(OPERATOR, [["a"], ["full"]])
    quotas.admit(OPERATOR, [["a"]])


def test_a_limit_that_is_changed_holds_at_once(quotas: Quotas) -> None:
    (grant,) = quotas.admit(caller(concurrency=1), [[]])
    quotas.admit(caller(concurrency=2), [[]])
    with pytest.raises(RateLimited):
        quotas.admit(caller(concurrency=2), [[]])
    grant.release()
    quotas.admit(caller(concurrency=2), [[]])


def test_accounts_that_are_as_good_as_new_are_forgotten(quotas: Quotas, clock: Clock, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_ACCOUNTS", 3)
    quotas.adapters = [("*", Limits(requests_per_minute=60, concurrency=9))]
    (running,) = quotas.admit(OPERATOR, [["running"]])
    for name in "abc":
        (grant,) = quotas.admit(OPERATOR, [[name]])
        grant.release()
    assert len(quotas._accounts) == 4, "none was as good as new"
    clock.now += 60
    quotas.admit(OPERATOR, [["d"]])
    assert {name for _, name in quotas._accounts} == {"running", "d"}
    running.release()
