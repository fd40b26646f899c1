"""Covers `cached_block.py`, `kv_group.py`, `page_table.py`, `reclaim.py`."""

import random

from multilora.memory.cached_block import HOLE
from multilora.memory.kv_group import KVGroup
from multilora.memory.page_pool import PageKind, PagePool
from multilora.memory.page_table import KVPages, PageTable
from multilora.memory.prefix_cache import PrefixCache
from multilora.memory.reclaim import GdsfClock, Reclaimer

BASE, ADAPTER_1, ADAPTER_2 = 0, 1, 2


def make(total: int = 32, page_size: int = 4) -> tuple[PagePool, PrefixCache, Reclaimer]:
    pool, clock = PagePool(total), GdsfClock()
    cache = PrefixCache(pool, clock, page_size)
    return pool, cache, Reclaimer(pool, clock, [cache])


def run(pool: PagePool, cache: PrefixCache, tokens: list[int], namespace: int, salt: str = "") -> list[int]:
    """As a request does: match, take the rest, compute, insert. Returns its pages."""
    matched = cache.match(tokens, lambda _: namespace, len(tokens) - 1, salt)
    cache.acquire(matched)
    pages = matched + pool.alloc_kv(-(-len(tokens) // cache.page_size) - len(matched))
    cache.insert(tokens, pages, lambda _: namespace, len(matched), 0, salt)
    return pages


def test_a_second_request_shares_full_pages_and_not_the_partial_one():
    pool, cache, _ = make()
    tokens = list(range(10))
    first = run(pool, cache, tokens, BASE)
    second = run(pool, cache, tokens, BASE)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert pool.count(PageKind.KV) == 4
    cache.check()


def test_two_that_compute_the_same_at_once_end_up_with_one_copy():
    pool, cache, _ = make()
    tokens = list(range(10))
    first, second = pool.alloc_kv(3), pool.alloc_kv(3)
    cache.insert(tokens, first, lambda _: BASE, 0, 0)
    cache.insert(tokens, second, lambda _: BASE, 0, 0)
    assert first[:2] == second[:2]
    assert pool.count(PageKind.KV) == 4
    cache.check()
    cache.release(first, fence=0)
    assert pool.count(PageKind.KV) == 3, "the other still holds the shared pages"
    cache.release(second, fence=0)
    pool.check()
    cache.check()


def test_the_last_token_is_never_served_from_the_cache():
    pool, cache, _ = make()
    tokens = list(range(8))
    run(pool, cache, tokens, BASE)
    assert len(cache.match(tokens, lambda _: BASE, len(tokens) - 1)) == 1


def test_namespaces_and_salts_share_nothing():
    pool, cache, _ = make()
    tokens = list(range(9))
    run(pool, cache, tokens, ADAPTER_1)
    assert cache.match(tokens, lambda _: ADAPTER_1, 9)
    assert not cache.match(tokens, lambda _: ADAPTER_2, 9)
    assert not cache.match(tokens, lambda _: BASE, 9)
    assert not cache.match(tokens, lambda _: ADAPTER_1, 9, salt="x")


def test_a_namespace_that_changes_within_the_sequence_shares_only_its_first_part():
    pool, cache, _ = make()
    tokens = list(range(12))
    run(pool, cache, tokens, BASE)
    activated = lambda page: BASE if page == 0 else ADAPTER_1  # noqa: E731
    assert len(cache.match(tokens, activated, 12)) == 1


def test_released_pages_are_idle_then_evicted_leaves_first():
    pool, cache, reclaimer = make(total=4)
    pages = run(pool, cache, list(range(12)), BASE)
    cache.release(pages, fence=0)
    assert (pool.count(PageKind.PREFIX), pool.free) == (3, 1)
    assert reclaimer.ensure(2, fence=0)
    assert pool.free == 2
    assert cache.match(list(range(12)), lambda _: BASE, 12) == pages[:2], "the leaf went first"
    assert not reclaimer.ensure(5, fence=0)
    assert pool.free == 2, "an impossible demand evicts nothing"
    cache.check()
    pool.check()


def test_popular_prefixes_outlive_others():
    pool, cache, reclaimer = make(total=4)
    popular, once = [1] * 4, [2] * 4
    for _ in range(3):
        cache.release(run(pool, cache, popular + [0], BASE), fence=0)
    cache.release(run(pool, cache, once + [0], BASE), fence=0)
    reclaimer.ensure(3, fence=0)
    assert cache.match(popular, lambda _: BASE, 4)
    assert not cache.match(once, lambda _: BASE, 4)


def test_devalued_namespace_goes_before_an_equal_one():
    pool, cache, reclaimer = make(total=4)
    cache.release(run(pool, cache, [1] * 4, ADAPTER_1), fence=0)
    cache.release(run(pool, cache, [1] * 4, ADAPTER_2), fence=0)
    cache.demote_namespace(ADAPTER_2)
    reclaimer.ensure(3, fence=0)
    assert cache.match([1] * 4, lambda _: ADAPTER_1, 4)
    assert not cache.match([1] * 4, lambda _: ADAPTER_2, 4)


def test_dropping_a_namespace_frees_its_pages():
    pool, cache, _ = make()
    cache.release(run(pool, cache, list(range(12)), ADAPTER_1), fence=0)
    cache.drop_namespace(ADAPTER_1, fence=0)
    assert pool.free == pool.total
    cache.check()


def test_disabled_cache_keeps_nothing():
    pool = PagePool(8)
    cache = PrefixCache(pool, GdsfClock(), 4, enabled=False)
    cache.release(run(pool, cache, list(range(8)), BASE), fence=0)
    assert pool.free == 8


def test_thousands_of_random_operations_keep_the_equation():
    rng = random.Random(0)
    pool, cache, reclaimer = make(total=40, page_size=2)
    live: list[list[int]] = []
    adapters: list[list[int]] = []
    step = 0
    for _ in range(6000):
        step += rng.random() < 0.3
        action = rng.random()
        if action < 0.4:
            tokens = [rng.randrange(3) for _ in range(rng.randrange(2, 14))]
            namespace = rng.randrange(3)
            matched = cache.match(tokens, lambda _, n=namespace: n, len(tokens) - 1)
            cache.acquire(matched)
            need = -(-len(tokens) // 2) - len(matched)
            if reclaimer.ensure(need, fence=step):
                pages = matched + pool.alloc_kv(need)
                cache.insert(tokens, pages, lambda _, n=namespace: n, len(matched), step)
                live.append(pages)
            else:
                cache.release(matched, fence=step)
        elif action < 0.75 and live:
            cache.release(live.pop(rng.randrange(len(live))), fence=step)
        elif action < 0.82 and pool.ready >= 3:
            adapters.append(pool.alloc_adapter(3))
        elif action < 0.88 and adapters:
            pool.free_pages(adapters.pop(rng.randrange(len(adapters))), fence=step)
        elif action < 0.94:
            pool.complete(max(pool.completed, step - rng.randrange(3)))
        elif action < 0.97:
            cache.demote_namespace(rng.randrange(3))
        elif action < 0.98:
            cache.flush(fence=step)
        pool.check()
        cache.check()
    for pages in live:
        cache.release(pages, fence=step)
    for pages in adapters:
        pool.free_pages(pages, fence=step)
    cache.flush(fence=step)
    assert pool.free == pool.total


# ---------------------------------------------------------------------- windows

FULL, WINDOW = KVGroup(), KVGroup(8)  # tokens; a block is 4


class Windowed:
    """A cache of two groups, over which requests run as the scheduler has them run."""

    def __init__(self, total: int = 64, groups: tuple[KVGroup, ...] = (FULL, WINDOW)):
        self.pool, clock = PagePool(total), GdsfClock()
        self.prefix = PrefixCache(self.pool, clock, 4, groups=groups)
        self.kv = KVPages(self.pool, self.prefix, Reclaimer(self.pool, clock, [self.prefix]), 1, 4)

    def run(self, tokens: list[int], chunk: int = 4) -> PageTable:
        """Read a prompt by chunks. What it holds stays."""
        table = self.kv.start(self.kv.match(tokens, lambda _: BASE, len(tokens) - 1, ""))
        for end in range(table.keyed * 4 + chunk, len(tokens) + chunk, chunk):
            end = min(end, len(tokens))
            assert self.kv.grow(table, end, 0)
            self.kv.commit(table, end, lambda: tokens, lambda _: BASE, 0, "")
            self.kv.leave_windows(table, end, 0)
            self.prefix.check()
            self.pool.check()
        return table

    def hit(self, tokens: list[int]) -> list[int]:
        return self.kv.match(tokens, lambda _: BASE, len(tokens), "")


def test_what_the_window_has_passed_is_idle_and_the_rest_is_held():
    world = Windowed()
    table = world.run(list(range(42)))
    assert table.pages[0::2].count(HOLE) == 0
    assert [page == HOLE for page in table.pages[1::2]] == [True] * 8 + [False] * 3
    assert (world.pool.count(PageKind.KV), world.pool.count(PageKind.PREFIX)) == (11 + 3, 8)
    world.kv.release(table, 0)
    world.prefix.flush(0)
    assert world.pool.free == 64


def test_without_a_cache_what_the_window_has_passed_is_free():
    world = Windowed()
    world.prefix.enabled = False
    table = world.run(list(range(42)))
    assert (world.pool.count(PageKind.KV), world.pool.free) == (14, 50)
    world.kv.release(table, 0)
    assert world.pool.free == 64


def test_a_hit_holds_only_the_window_before_its_end():
    world = Windowed()
    first = world.run(list(range(42)))
    pages = world.hit(list(range(24)) + [99])
    assert len(pages) == 2 * 6, "another text that goes on from here finds what the first has left behind"
    assert [page == HOLE for page in pages[1::2]] == [True] * 4 + [False] * 2
    second = world.run(list(range(24)) + [99] * 3)
    assert second.pages[:12:2] == first.pages[:12:2] and second.pages[11] == pages[11]
    world.kv.release(first, 0)
    world.kv.release(second, 0)
    world.prefix.check()


def test_a_prefix_whose_window_has_been_evicted_is_of_no_use():
    world = Windowed(total=24)
    table = world.run(list(range(42)))
    assert world.kv.reclaimer.ensure(8, 0), "2 are free, and 8 have been left behind"
    assert world.pool.count(PageKind.PREFIX) == 2
    assert not world.hit(list(range(24)))
    assert len(world.hit(list(range(40)))) == 2 * 10, "where the first text is now its window is complete"
    world.kv.release(table, 0)
    assert len(world.hit(list(range(41)))) == 2 * 10
    world.prefix.check()


def test_two_texts_hold_different_parts_of_a_block():
    world = Windowed()
    ahead, behind = world.run(list(range(41))), world.run(list(range(13)))
    assert behind.pages[:6:2] == ahead.pages[:6:2]
    assert HOLE not in behind.pages[2:6] and set(ahead.pages[1:6:2]) == {HOLE}
    world.kv.release(ahead, 0)
    assert [world.pool.kind(page) for page in behind.pages[2:6]] == [PageKind.KV] * 4
    world.kv.release(behind, 0)
    world.prefix.check()


def test_a_page_that_was_evicted_comes_back_with_the_next_text_that_computes_it():
    world = Windowed(total=24)
    first = world.run(list(range(42)))
    world.kv.reclaimer.ensure(10, 0)
    second = PageTable()
    world.kv.grow(second, 8, 0)
    world.kv.commit(second, 8, lambda: list(range(8)), lambda _: BASE, 0, "")
    assert second.pages[0] == first.pages[0], "the first was there"
    assert len(world.hit(list(range(8)))) == 4, "and the second one's window"
    world.kv.release(first, 0)
    world.kv.release(second, 0)
    world.prefix.check()


def test_a_leaf_takes_along_what_nobody_could_use_without_it():
    world = Windowed(total=24)
    world.kv.release(world.run(list(range(41))), 0)
    world.kv.reclaimer.ensure(24 - 4, 0)
    assert world.pool.count(PageKind.PREFIX) <= 4
    world.prefix.check()
    assert world.kv.reclaimer.ensure(24, 0)
    assert world.pool.free == 24 and not world.prefix._nodes


def test_if_all_layers_have_a_window_only_that_is_kept():
    world = Windowed(groups=(KVGroup(8),))
    table = world.run(list(range(41)))
    assert (world.pool.count(PageKind.KV), world.pool.count(PageKind.PREFIX)) == (3, 8)
    assert [page == HOLE for page in world.hit(list(range(40)))] == [True] * 8 + [False] * 2
    world.prefix.drop_namespace(BASE, 0)
    world.prefix.check()
    assert not world.hit(list(range(40)))
    world.kv.release(table, 0)
    world.prefix.check()
    assert world.pool.free == 64
