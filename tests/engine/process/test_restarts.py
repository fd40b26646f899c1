"""How often and when: with a clock of its own."""

from multilora.engine.process.restarts import LONGEST_PAUSE_SECONDS, STABLE_SECONDS, RestartCount


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pauses_double_and_then_it_is_over() -> None:
    count = RestartCount(8)
    assert [count.next_pause() for _ in range(9)] == [
        0,
        1,
        2,
        4,
        8,
        16,
        LONGEST_PAUSE_SECONDS,
        LONGEST_PAUSE_SECONDS,
        None,
    ]
    assert count.total == 8


def test_none_at_all() -> None:
    count = RestartCount(0)
    assert count.next_pause() is None and count.total == 0


def test_one_that_has_lived_long_begins_a_new_row() -> None:
    clock = Clock()
    count = RestartCount(2, clock)
    count.started()
    clock.now += STABLE_SECONDS - 1
    assert count.next_pause() == 0.0
    count.started()
    clock.now += STABLE_SECONDS
    assert count.next_pause() == 0.0, "the one before does not count any more"
    assert count.next_pause() == 1.0, "it did not come up"
    assert count.next_pause() is None
    assert count.total == 3
