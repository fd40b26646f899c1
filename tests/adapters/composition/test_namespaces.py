"""Who may use whose KV, and that nothing is remembered for ever."""

import random

import pytest

from multilora.adapters.composition.namespaces import SWEEP_AT, Namespaces
from multilora.memory.page_pool import PagePool
from multilora.memory.prefix_cache import PrefixCache
from multilora.memory.reclaim import GdsfClock
from multilora.params import Composition


class World:
    def __init__(self, pages: int = 64):
        self.pool = PagePool(pages)
        self.prefix = PrefixCache(self.pool, GdsfClock(), page_size=2)
        self.namespaces = Namespaces(self.prefix)

    def cache(self, namespace: int, token: int = 5) -> None:
        """One idle page under it."""
        pages = self.pool.alloc_kv(1)
        self.prefix.insert([token, token], pages, lambda _: namespace, 0, 0)
        self.prefix.release(pages, 0)

    def cached(self, namespace: int, token: int = 5) -> bool:
        return bool(self.prefix.match([token, token], lambda _: namespace, 2))

    def pages_of(self, composition: Composition, pre_activation: int = 0) -> int:
        """A request comes, leaves a page behind, and goes."""
        namespace = self.namespaces.acquire(composition, pre_activation)
        self.cache(namespace)
        self.namespaces.release(composition, pre_activation)
        return namespace


@pytest.fixture
def world() -> World:
    return World()


def test_base_and_plain_versions_have_fixed_numbers(world):
    assert world.namespaces.acquire(()) == world.namespaces.acquire((), 3) == 0
    assert world.namespaces.acquire(((0, 1.0),)) == 1
    assert world.namespaces.acquire(((7, 1.0),)) == 8
    world.namespaces.release(())
    world.namespaces.release(((7, 1.0),))
    assert len(world.namespaces) == 0


def test_all_that_differs_differs(world):
    keys = [
        ((), 0),
        (((1, 1.0),), 0),
        (((1, 0.5),), 0),
        (((1, -1.0),), 0),
        (((1, 1.0), (2, 1.0)), 0),
        (((1, 1.0), (2, 0.5)), 0),
        (((1, 0.5), (2, 1.0)), 0),
        (((1, 1.0), (3, 1.0)), 0),
        (((1, 1.0),), 1),
        (((1, 1.0),), 2),
    ]
    numbers = [world.namespaces.acquire(*key) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert [world.namespaces.acquire(*key) for key in keys] == numbers


def test_it_is_the_same_again_as_long_as_a_page_is_there(world):
    mix = ((1, 0.5), (2, 0.5))
    first = world.pages_of(mix)
    assert world.namespaces.acquire(mix) == first


def test_a_version_that_is_gone_takes_all_its_pages_along(world):
    mixes = [((1, 0.5), (2, 0.5)), ((2, 0.5), (3, 0.5)), ((1, 2.0),), ((1, 1.0),), ((3, 1.0),), ()]
    numbers = [world.pages_of(mix) for mix in mixes] + [world.pages_of(((1, 1.0),), 1)]
    world.namespaces.drop(1, 0)
    assert [world.cached(n) for n in numbers] == [False, True, False, False, True, True, False]
    world.namespaces.drop(2, 0)
    world.namespaces.drop(3, 0)
    assert [world.cached(n) for n in numbers] == [False, False, False, False, False, True, False]
    assert len(world.namespaces) == 0
    assert world.namespaces._of_version == {}
    world.prefix.check()


def test_numbers_are_never_used_again(world):
    mix = ((1, 0.5),)
    first = world.pages_of(mix)
    world.namespaces.drop(1, 0)
    assert world.namespaces.acquire(mix) != first


def test_a_version_that_leaves_the_device_makes_its_pages_worth_less():
    world = World(pages=3)
    world.pages_of(((1, 0.5), (2, 0.5)))
    other = world.pages_of(((3, 0.5),))
    world.namespaces.demote(2)
    world.prefix.evict(0)
    assert world.cached(other)
    world.namespaces.demote(9)  # never seen


def test_memory_is_bounded_by_requests_and_pages():
    """Ten thousand weights, as a slider would send them."""
    world = World(pages=20)
    rng = random.Random(0)
    held = []
    for i in range(10_000):
        mix = ((1, i / 7), (2, 1.0))
        held.append(mix)
        number = world.namespaces.acquire(mix)
        if world.pool.free == 0:
            world.prefix.evict(0)
        world.cache(number)
        if len(held) > 10:
            world.namespaces.release(held.pop(rng.randrange(len(held))))
    assert len(world.namespaces) <= max(SWEEP_AT, 2 * (20 + 11))
    for mix in held:
        world.namespaces.release(mix)
