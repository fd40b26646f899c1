"""Which names have labels. Covers `metrics/top_names.py`."""

import random

from multilora.server.metrics.top_names import CANDIDATES, RANK_SECONDS, TopNames


class Count:
    """A series with one number."""

    def __init__(self):
        self.number = 0

    def absorb(self, other):
        self.number += other.number


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def top(limit):
    clock = Clock()
    return TopNames(limit, Count, clock), clock


def use(names, name, times=1):
    for _ in range(times):
        names.use(name).number += 1


def numbers(names):
    return {name: series.number for name, series in names.items()}


def test_the_first_names_have_labels_and_the_rest_is_other():
    names, _ = top(2)
    for name in "abcab":
        use(names, name)
    names.rank()
    assert numbers(names) == {"a": 2, "b": 2, "other": 1, "retired": 0}


def test_who_is_used_more_takes_the_place_of_who_is_used_least():
    names, clock = top(2)
    use(names, "a", 10)
    use(names, "b", 3)
    use(names, "c", 7)
    names.rank()
    assert "c" not in names, "it is not a minute yet"
    clock.now = RANK_SECONDS
    names.rank()
    use(names, "c")
    assert numbers(names) == {"a": 10, "c": 1, "other": 7, "retired": 3}


def test_about_as_much_use_changes_nothing():
    names, clock = top(1)
    for minute in range(1, 20):
        use(names, "a", 10)
        use(names, "b", 10 + minute % 2)
        clock.now = minute * RANK_SECONDS
        names.rank()
    assert "a" in names


def test_use_is_forgotten_with_time():
    names, clock = top(1)
    use(names, "old", 1000)
    for minute in range(1, 12):
        use(names, "new", 10)
        clock.now = minute * RANK_SECONDS
        names.rank()
    assert "new" in names
    assert "old" not in names


def test_an_unloaded_name_makes_room():
    names, _ = top(1)
    use(names, "a", 2)
    use(names, "b")
    names.forget("a")
    use(names, "b")
    assert numbers(names) == {"b": 1, "other": 1, "retired": 2}
    names.forget("never used")


def test_names_that_mean_several_have_no_label_of_their_own():
    names, clock = top(5)
    use(names, "other", 3)
    use(names, "retired", 4)
    clock.now = RANK_SECONDS
    names.rank()
    assert numbers(names) == {"other": 7, "retired": 0}


def test_nothing_is_lost_and_nothing_goes_backwards():
    draw = random.Random(3)
    names, clock = top(4)
    before = {}
    for i in range(4000):
        name = f"n{draw.randrange(3) + i // 200}"
        if draw.random() < 0.01:
            names.forget(name)
            before.pop(name, None)
        use(names, name)
        if draw.random() < 0.05:
            clock.now += RANK_SECONDS / 2
            names.rank()
            now = numbers(names)
            assert sum(now.values()) == i + 1
            assert len(now) <= 4 + 2
            assert all(now[name] >= number for name, number in before.items() if name in now)
            before = now


def test_names_that_clients_could_make_take_bounded_memory():
    names, _ = top(4)
    for _ in range(3):
        for i in range(2000):
            use(names, f"n{i}")
    assert len(names._use) <= (CANDIDATES + 1) * 4 + 1
    assert sum(numbers(names).values()) == 6000
