"""When a front process counts as silent; the rest is tested with the pool of such processes."""

import pytest

from multilora.drivers.workers.process import CHECK_SECONDS, LATE_SECONDS, Silence


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def seconds_until_too_long(silence: Silence, clock: Clock, *, heard_every: float | None = None) -> float | None:
    began = last = clock.now
    while clock.now - began < 60:
        clock.now += CHECK_SECONDS
        if heard_every is not None and clock.now - last >= heard_every:
            last = clock.now
            silence.end()
        if silence.too_long():
            return clock.now - began
    return None


@pytest.mark.parametrize("limit", [1, 4, 30])
def test_who_says_nothing_is_silent_for_too_long(limit: float) -> None:
    clock = Clock()
    found = seconds_until_too_long(Silence(limit, clock), clock)
    assert found is not None and limit < found <= limit + 2 * CHECK_SECONDS


def test_who_speaks_twice_a_second_is_not() -> None:
    clock = Clock()
    silence = Silence(4, clock)
    assert seconds_until_too_long(silence, clock, heard_every=0.5) is None
    assert seconds_until_too_long(silence, clock) is not None


def test_who_did_not_listen_has_heard_nothing() -> None:
    """This process was stopped, or its loop was held up: what the other one said waits to be read."""
    clock = Clock()
    silence = Silence(4, clock)
    clock.now += 4 + LATE_SECONDS
    assert not silence.too_long()
    assert seconds_until_too_long(silence, clock) is not None
