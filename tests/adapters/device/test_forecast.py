import pytest
import torch

from multilora.adapters.device.copier import CopyInFlight
from multilora.adapters.device.forecast import FORGET, CopyForecast


class Done:
    def done(self) -> bool:
        return True


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.forecast = CopyForecast(lambda: self.now)

    def start(self, *sizes: int) -> list[CopyInFlight]:
        return [CopyInFlight(Done(), torch.zeros(1, nbytes, dtype=torch.uint8), self.now) for nbytes in sizes]

    def copy(self, nbytes: int, seconds: float) -> None:
        started = self.start(nbytes)
        self.now += seconds
        self.forecast.observe(started)

    def left(self, copies: list[CopyInFlight]) -> list[float | None]:
        """For each of them, which are all that are in flight."""
        return [self.forecast.seconds_left(copies[: i + 1]) for i in range(len(copies))]


@pytest.fixture
def world() -> World:
    return World()


def test_nothing_is_known_before_the_first_copy(world: World) -> None:
    assert world.left(world.start(100)) == [None]


def test_copies_wait_for_those_before_them(world: World) -> None:
    world.copy(100, 2.0)  # 50 a second
    copies = world.start(100, 50, 200)
    assert world.left(copies) == [2.0, 3.0, 7.0]
    world.now += 1.5
    assert world.left(copies) == [0.5, 1.5, 5.5]
    world.now += 1.0
    assert world.left(copies[:1]) == [0.0], "late: it can be done any moment"


def test_copies_found_done_together_shared_the_time(world: World) -> None:
    copies = world.start(100, 100)
    world.now += 4.0
    world.forecast.observe(copies)
    assert world.left(world.start(100)) == [2.0]


def test_the_link_is_free_once_the_last_was_seen_done(world: World) -> None:
    first, second = world.start(100, 100)
    world.now += 2.0
    world.forecast.observe([first])
    world.now += 1.0
    world.forecast.observe([second])  # in 1 second, not in 3
    assert world.left(world.start(100)) == [1.0]


def test_a_copy_that_was_seen_late_hardly_counts(world: World) -> None:
    world.copy(100, 1.0)
    world.copy(100, 50.0)
    assert world.left(world.start(100)) == [pytest.approx(1.0 / FORGET)]


def test_instant_copies_teach_nothing(world: World) -> None:
    world.copy(100, 0.0)
    assert world.left(world.start(100)) == [None]
