"""Covers `page_table.py`, `reclaim.py`."""

import random

from multilora.memory.page_pool import PageKind, PagePool
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
