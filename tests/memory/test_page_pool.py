import pytest

from multilora.memory.page_pool import PageKind, PagePool


def test_alloc_and_free_balance():
    pool = PagePool(8)
    kv = pool.alloc_kv(3)
    adapter = pool.alloc_adapter(2)
    assert len(set(kv) | set(adapter)) == 5
    assert (pool.free, pool.count(PageKind.KV), pool.count(PageKind.ADAPTER)) == (3, 3, 2)
    pool.free_pages(kv, fence=0)
    assert pool.free == 6
    pool.check()


def test_fenced_pages_serve_compute_at_once_and_copies_only_after_the_step():
    pool = PagePool(2)
    pages = pool.alloc_kv(2)
    pool.free_pages(pages, fence=5)
    assert (pool.free, pool.ready) == (2, 0)
    again = pool.alloc_kv(1)  # compute runs after step 5 anyway
    pool.complete(4)
    assert pool.ready == 0
    pool.complete(5)
    assert pool.ready == 1
    pool.alloc_adapter(1)
    pool.free_pages(again, fence=5)
    assert pool.ready == 1
    pool.check()


def test_double_free_is_our_bug():
    pool = PagePool(2)
    pages = pool.alloc_kv(1)
    pool.free_pages(pages, fence=0)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free_pages(pages, fence=0)


def test_only_kv_and_prefix_change_into_each_other():
    pool = PagePool(2)
    (page,) = pool.alloc_adapter(1)
    with pytest.raises(AssertionError):
        pool.move(page, PageKind.PREFIX)


def test_check_finds_a_corrupted_book():
    pool = PagePool(2)
    pool.alloc_kv(1)
    pool._count[PageKind.KV] = 2
    with pytest.raises(AssertionError, match="drifted"):
        pool.check()
