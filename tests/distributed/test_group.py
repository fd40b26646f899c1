"""Collectives of ranks that are threads here, over gloo; and what a rank that is gone does to the others."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from multilora.distributed.group import SINGLE, Group, ProcessGroup, join
from multilora.errors import ConfigError

CPU = torch.device("cpu")


def on_ranks(path: Path, size: int, function: Callable[[Group], Any], device: torch.device = CPU) -> list[Any]:
    """What the function returns on each rank."""
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        found[rank] = function(join(str(path / "meeting"), rank, size, device, 30.0))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 4])
def test_collectives(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    def use(group: Group) -> Any:
        x = (torch.arange(6, dtype=dtype).view(2, 3) + group.rank).T  # not contiguous
        with torch.inference_mode():
            return group.all_reduce(x.clone()), group.all_gather(x), group.minimum(10 - group.rank)

    parts = [(torch.arange(6, dtype=dtype).view(2, 3) + rank).T for rank in range(size)]
    for total, gathered, least in on_ranks(tmp_path, size, use):
        assert torch.equal(total, torch.stack(parts).sum(0))
        assert all(torch.equal(found, part) for found, part in zip(gathered, parts, strict=True))
        assert least == 11 - size


def test_a_single_rank_talks_to_nobody(tmp_path: Path) -> None:
    group = join(str(tmp_path / "meeting"), 0, 1, CPU, 30.0)
    assert group is SINGLE and not list(tmp_path.iterdir())
    x = torch.ones(2)
    assert group.all_reduce(x) is x and group.all_gather(x)[0] is x and group.minimum(3) == 3


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tp-size 2: rank 0 does not reach the others"):
        join(str(tmp_path / "meeting"), 0, 2, CPU, 0.2)


def test_a_rank_that_stays_away_from_a_collective(tmp_path: Path) -> None:
    def use(group: Group) -> str:
        if group.rank == 1:
            time.sleep(1.0)
            return ""
        with pytest.raises(RuntimeError) as caught:
            group.all_reduce(torch.ones(1))
        return str(caught.value)

    def run(rank: int) -> None:
        found[rank] = use(join(str(tmp_path / "meeting"), rank, 2, CPU, 0.5))

    found = ["", ""]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0]


def test_leaving_does_not_wait_for_a_graph_that_holds_the_group(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As NCCL does, though it ends what waits on the device at once."""

    class Held:
        def __init__(self) -> None:
            self.aborted, self.graph_gone = threading.Event(), threading.Event()

        def abort(self) -> None:
            self.aborted.set()
            self.graph_gone.wait(30.0)

    monkeypatch.setattr("multilora.distributed.group.CLOSE_SECONDS", 0.05)
    backend = Held()
    group = ProcessGroup(backend, 0, 2, torch.device("cuda", 0))
    try:
        group.close()
        group.close()
        assert backend.aborted.is_set() and not backend.graph_gone.is_set()
        assert [record.message for record in caplog.records] == [
            "NCCL has not left its group: a CUDA graph still holds it"
        ]
    finally:
        backend.graph_gone.set()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl(tmp_path: Path) -> None:
    """One thread per device: the calls are queued, so that neither waits for the other with the GIL held."""
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        group = join(str(tmp_path / "meeting"), rank, 2, device, 60.0)
        x = torch.full((4, 8), rank + 1.0, device=device, dtype=torch.bfloat16)
        parts = [part.cpu() for part in group.all_gather(x)]
        found[rank] = group.all_reduce(x).cpu(), parts, group.minimum(rank + 3)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for total, parts, least in found:
        assert (total == 3).all() and [part[0, 0].item() for part in parts] == [1, 2] and least == 3
