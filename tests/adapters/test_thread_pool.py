"""Work on several threads: everything is done once, errors come out, nothing is left running."""

import threading

import pytest

from multilora.adapters import thread_pool as module
from multilora.adapters.thread_pool import ReaderPool, spare_cores


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 3, 500])
def test_every_item_once(threads: int, items: int) -> None:
    done: list[int] = []
    ReaderPool(threads).each(done.append, range(items))
    assert sorted(done) == list(range(items))


def test_the_threads_work_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=10)
    ReaderPool(3).each(lambda _: barrier.wait() and None, range(3))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [0, 1, 7])
def test_an_error_comes_out(threads: int, bad: int) -> None:
    def work(item: int) -> None:
        if item == bad:
            raise ValueError(f"item {item}")

    readers = ReaderPool(threads)
    with pytest.raises(ValueError, match=f"item {bad}"):
        readers.each(work, range(8))
    done: list[int] = []
    readers.each(done.append, range(8))
    assert len(done) == 8, "and it works on"


@pytest.mark.parametrize("threads", [1, 2])
def test_start_answers_with_the_result_or_the_error(threads: int) -> None:
    readers = ReaderPool(threads)
    assert readers.alone == (threads == 1)
    assert readers.start(lambda: 7).result(10) == 7
    assert isinstance(readers.start(lambda: 1 // 0).exception(10), ZeroDivisionError)


def test_work_started_may_use_the_pool_though_it_holds_the_only_thread() -> None:
    readers = ReaderPool(2)
    done: list[int] = []
    readers.start(lambda: readers.each(done.append, range(50))).result(10)
    assert sorted(done) == list(range(50))


def test_several_callers_share_one_pool() -> None:
    readers = ReaderPool(3)
    done: list[int] = []
    callers = [threading.Thread(target=readers.each, args=(done.append, range(100))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(10)
    assert sorted(done) == sorted(list(range(100)) * 4)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (16, 12), (128, 12)])
def test_cores_are_left_to_the_step_loop(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert spare_cores(12) == threads
