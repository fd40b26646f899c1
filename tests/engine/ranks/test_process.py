"""A rank's share of the cores; its process, with its deaths: `test_processes.py`."""

import os
from collections.abc import Iterator

import pytest
import torch

from multilora.engine.ranks.process import divide_cores


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (16, 1, 15), (16, 4, 3)])
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    divide_cores(ranks)
    assert torch.get_num_threads() == threads


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    divide_cores(1)
    assert torch.get_num_threads() == 3
