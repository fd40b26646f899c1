"""Adapters' pages on their way to other ranks through shared memory: what arrives, when it counts as arrived, and how
both ends end."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zmq
from fakes.engine_driver import EngineDriver
from fakes.models import make_adapter, make_tiny_model

from multilora.adapters.device.copier import Copier, Copy, DirectCopier
from multilora.adapters.host.staging import Staging
from multilora.engine.ranks import page_relay
from multilora.engine.ranks.messages import RankProgress
from multilora.engine.ranks.page_relay import PageReceiver, PageRelay

PAGE = 64
SECONDS = 20.0


def wait_until(what: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.001)


class ThreadCopier:
    """Copies on a thread of its own, as on a GPU. held: nothing is done before."""

    def __init__(self, arena: torch.Tensor, held: threading.Event | None = None):
        self._direct, self._held = DirectCopier(arena), held

    def start_copy(self, buffer: torch.Tensor, pages: list[int], table: None = None) -> Copy:
        done = threading.Event()

        def work() -> None:
            if self._held is not None:
                self._held.wait(SECONDS)
            self._direct.start_copy(buffer, pages)
            done.set()

        threading.Thread(target=work, daemon=True).start()
        return _Copy(done)

    def close(self) -> None: ...


class _Copy:
    def __init__(self, finished: threading.Event):
        self._finished = finished

    def done(self) -> bool:
        return self._finished.is_set()


class Ends:
    """Rank 0's end and those of the other ranks, each with an arena."""

    def __init__(self, directory: Path, ranks: int, make_copier: Callable[[torch.Tensor], Copier] = ThreadCopier):
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.progress = RankProgress(str(directory), ranks, create=True)
        self.relay = PageRelay(self.context, str(directory), self.progress)
        self.arenas = [torch.zeros(256, PAGE, dtype=torch.uint8) for _ in range(1, ranks)]
        self.receivers = [
            PageReceiver(
                self.context,
                str(directory),
                rank,
                PAGE,
                make_copier(arena),
                RankProgress(str(directory), ranks),
                arena.device,
            )
            for rank, arena in enumerate(self.arenas, 1)
        ]

    def close(self) -> None:
        self.relay.close()
        for receiver in self.receivers:
            receiver.close()
        self.context.term()  # which waits for sockets that are left


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_relay, "SLOT_BYTES", 4 * PAGE)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_gets_its_part_of_every_adapter(tmp_path: Path, ranks: int) -> None:
    """Of one page, of a slot, of more than all slots; in scattered pages."""
    ends = Ends(tmp_path, ranks)
    places = torch.randperm(256, generator=torch.Generator().manual_seed(0)).tolist()
    expected = [torch.zeros(256, PAGE, dtype=torch.uint8) for _ in ends.arenas]
    sizes = [1, 4, 37, 2, 20]
    for count in sizes:
        pages = [places.pop() for _ in range(count)]
        parts = [torch.randint(1, 255, (count, PAGE), dtype=torch.uint8) for _ in ends.arenas]
        for arena, part in zip(expected, parts, strict=True):
            arena[pages] = part
        ends.relay.send(pages, parts)
    wait_until(lambda: (ends.progress.copies[1:] == len(sizes)).all())
    assert all(torch.equal(arena, wanted) for arena, wanted in zip(ends.arenas, expected, strict=True))
    pieces = sum(-(-count // 4) for count in sizes)
    assert ends.progress.pieces[1:].tolist() == [pieces] * (ranks - 1) and not ends.progress.copies[0]
    ends.close()


def test_a_rank_that_copies_slowly_holds_up_its_slots_only(tmp_path: Path) -> None:
    held = threading.Event()
    ends = Ends(tmp_path, 2, lambda arena: ThreadCopier(arena, held))
    part = torch.randint(1, 255, (40, PAGE), dtype=torch.uint8)
    ends.relay.send(list(range(40)), [part])
    time.sleep(0.1)
    assert not ends.arenas[0].any() and not ends.progress.copies[1]
    held.set()
    wait_until(lambda: ends.progress.copies[1] == 1)
    assert torch.equal(ends.arenas[0][:40], part)
    ends.close()


def test_what_lies_in_staging_memory_is_copied_from_there(tmp_path: Path) -> None:
    """By two ranks, between adapters that lie elsewhere; nothing of it goes through slots."""
    ends, staging = Ends(tmp_path, 3), Staging(1 << 16)
    ends.relay.use_staging(staging)
    count = 9
    view = staging.view(4096, 2 * count * PAGE, lambda _: None).view(2, count, PAGE)
    view.copy_(torch.randint(1, 255, view.shape, dtype=torch.uint8))
    pages = torch.randperm(256, generator=torch.Generator().manual_seed(1)).tolist()
    ends.relay.send(pages[:count], list(view))
    wait_until(lambda: (ends.progress.copies[1:] == 1).all())
    assert ends.relay._slots is None and ends.progress.pieces[1:].tolist() == [1, 1]
    others = [torch.randint(1, 255, (6, PAGE), dtype=torch.uint8) for _ in ends.arenas]
    ends.relay.send(pages[20:26], others)
    ends.relay.send(pages[40 : 40 + count], list(view.flip(1)))  # a copy of its own, not in staging memory
    ends.relay.send(pages[60 : 60 + count], list(view))
    wait_until(lambda: (ends.progress.copies[1:] == 4).all())
    for arena, own, other in zip(ends.arenas, view, others, strict=True):
        assert torch.equal(arena[pages[:count]], own) and torch.equal(arena[pages[60 : 60 + count]], own)
        assert torch.equal(arena[pages[20:26]], other) and torch.equal(arena[pages[40 : 40 + count]], own.flip(0))
    ends.close()
    del view
    staging.close()


def test_both_ends_close_while_something_is_on_its_way(tmp_path: Path) -> None:
    ends = Ends(tmp_path, 2, lambda arena: ThreadCopier(arena, threading.Event()))
    ends.relay.send(list(range(40)), [torch.ones(40, PAGE, dtype=torch.uint8)])
    began = time.monotonic()
    ends.close()
    assert time.monotonic() - began < 5


def test_what_goes_wrong_is_raised_by_check(tmp_path: Path) -> None:
    class Broken:
        def start_copy(self, buffer: torch.Tensor, pages: list[int], table: None = None) -> Copy:
            raise RuntimeError("the device is lost")

        def close(self) -> None: ...

    ends = Ends(tmp_path, 2, lambda arena: Broken())
    ends.receivers[0].check()
    ends.relay.send([3], [torch.ones(1, PAGE, dtype=torch.uint8)])
    wait_until(lambda: ends.receivers[0]._error)
    with pytest.raises(RuntimeError, match="the device is lost"):
        ends.receivers[0].check()
    ends.close()


def test_ranks_whose_copies_run_beside_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, with adapters that come and go, token for token."""
    make_tiny_model(tmp_path / "model")
    names = {name: tmp_path / name for name in "abc"}
    for seed, path in enumerate(names.values()):
        make_adapter(path, tmp_path / "model", seed=seed, r=4, target_modules=["q_proj", "o_proj", "down_proj"])
    jobs = [(name, [5 + i, 6, 7]) for i in range(4) for name in (None, *names)]
    sent: list[list[int]] = []
    send = PageRelay.send
    monkeypatch.setattr(PageRelay, "send", lambda self, pages, parts: (sent.append(pages), send(self, pages, parts)))
    found = []
    for ranks in (1, 2):
        if ranks == 2:
            monkeypatch.setattr("multilora.engine.ranks.follow.own_copier", lambda _, arena: ThreadCopier(arena))
            monkeypatch.setattr("multilora.engine.build_rank.DirectCopier", ThreadCopier)
        driver = EngineDriver(tmp_path / "model", names, tp_size=ranks, max_loras_per_batch=2)
        rids = [driver.submit(prompt, name, max_new_tokens=8, ignore_eos=True) for name, prompt in jobs]
        driver.run(max_steps=200_000)
        found.append([driver.answers[rid].tokens for rid in rids])
        driver.close()
    assert found[0] == found[1]
    assert len(sent) >= len(names), "no adapter went that way"
