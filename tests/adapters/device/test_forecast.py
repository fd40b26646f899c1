import pytest

from multilora.adapters.device.forecast import FORGET, CopyForecast


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.forecast = CopyForecast(lambda: self.now)

    def copy(self, version: int, nbytes: int, seconds: float) -> None:
        self.forecast.started(version, nbytes)
        self.now += seconds
        self.forecast.finished([version])

    def left(self, *versions: int) -> list[float | None]:
        return [self.forecast.seconds_left(version) for version in versions]


@pytest.fixture
def world() -> World:
    return World()


def test_nothing_is_known_before_the_first_copy(world: World) -> None:
    world.forecast.started(1, 100)
    assert world.left(1, 2) == [None, None]


def test_copies_wait_for_those_before_them(world: World) -> None:
    world.copy(1, 100, 2.0)  # 50 a second
    for version, nbytes in ((2, 100), (3, 50), (4, 200)):
        world.forecast.started(version, nbytes)
    assert world.left(2, 3, 4, 5) == [2.0, 3.0, 7.0, None]
    world.now += 1.5
    assert world.left(2, 3, 4) == [0.5, 1.5, 5.5]
    world.now += 1.0
    assert world.left(2) == [0.0], "late: it can be there any moment"


def test_copies_found_done_together_shared_the_time(world: World) -> None:
    world.forecast.started(1, 100)
    world.forecast.started(2, 100)
    world.now += 4.0
    world.forecast.finished([1, 2])
    world.forecast.started(3, 100)
    assert world.left(3) == [2.0]


def test_the_link_is_free_once_the_last_was_seen_done(world: World) -> None:
    world.forecast.started(1, 100)
    world.forecast.started(2, 100)
    world.now += 2.0
    world.forecast.finished([1])
    world.now += 1.0
    world.forecast.finished([2])  # in 1 second, not in 3
    world.forecast.started(3, 100)
    assert world.left(3) == [1.0]


def test_a_copy_that_was_seen_late_hardly_counts(world: World) -> None:
    world.copy(1, 100, 1.0)
    world.copy(2, 100, 50.0)
    world.forecast.started(3, 100)
    assert world.left(3) == [pytest.approx(1.0 / FORGET)]


def test_instant_copies_teach_nothing(world: World) -> None:
    world.copy(1, 100, 0.0)
    world.forecast.started(2, 100)
    assert world.left(2) == [None]
    assert world.forecast.copying
