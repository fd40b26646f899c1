"""The real loader process: results, typed errors, sudden death, and nothing left behind."""

import contextlib
import itertools
import os
import re
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import torch
from fakes.tiers import BASE, PAGE_BYTES, TARGET, write_adapter
from safetensors.torch import load_file, save_file

from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.host.staging import Staging
from multilora.adapters.loading import child_process as child_process
from multilora.adapters.loading.loader import FetchContext, Fetched, FetchJob, allocate_private, fetch
from multilora.adapters.loading.process import ProcessLoader
from multilora.adapters.packing.blocks import PackTarget
from multilora.lora.sites import LoraSite, LoraSlice

CONTEXT = FetchContext(BASE, TARGET, AdapterLimits())
SECONDS = 120


def wait_for(loader: ProcessLoader, *versions: int) -> dict[int, tuple[Fetched, torch.Tensor | None]]:
    """Poll when the descriptor says so, until these versions have been answered."""
    answers: dict[int, tuple[Fetched, torch.Tensor | None]] = {}
    end = time.monotonic() + SECONDS
    while not answers.keys() >= set(versions):
        assert time.monotonic() < end, f"only {sorted(answers)} of {versions} were answered"
        select.select([loader.fileno()], [], [], 0.05)
        for result, pages in loader.poll():
            assert result.version not in answers
            answers[result.version] = (result, pages)
    return answers


def open_files() -> int:
    """Never more afterwards: fewer, if something of an earlier test goes meanwhile."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def shared() -> Iterator[ProcessLoader]:
    """One process for the tests that leave it alive."""
    loader = ProcessLoader(CONTEXT)
    yield loader
    loader.close()


@pytest.fixture
def own() -> Iterator[ProcessLoader]:
    loader = ProcessLoader(CONTEXT)
    yield loader
    loader.close()


def test_the_same_bytes_as_in_this_process(shared: ProcessLoader, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", rank=20)
    shared.submit(FetchJob(1, path))
    result, pages = wait_for(shared, 1)[1]
    expected, expected_pages = fetch(FetchJob(1, path), CONTEXT, allocate_private)
    assert result == expected
    assert torch.equal(pages, expected_pages)


def test_typed_errors_come_through_and_the_process_lives_on(shared: ProcessLoader, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    write_adapter(broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    process = shared._child.process.pid
    shared.submit(FetchJob(1, str(tmp_path / "missing")))
    shared.submit(FetchJob(2, str(broken)))
    shared.submit(FetchJob(3, write_adapter(tmp_path / "other model", width=32)))
    shared.submit(FetchJob(4, write_adapter(tmp_path / "good"), max_bytes=10))
    shared.submit(FetchJob(5, str(tmp_path / "good")))
    answers = wait_for(shared, 1, 2, 3, 4, 5)
    kinds = [answers[v][0].kind for v in range(1, 6)]
    assert kinds == ["AdapterNotFound", "AdapterInvalid", "AdapterIncompatible", "AdapterIncompatible", ""]
    assert [answers[v][1] is None for v in range(1, 6)] == [True] * 4 + [False]
    assert shared._child.process.pid == process


def test_a_job_too_long_for_a_message_fails_alone(shared: ProcessLoader, tmp_path: Path) -> None:
    shared.submit(FetchJob(1, "x" * (1 << 21)))
    shared.submit(FetchJob(2, write_adapter(tmp_path / "a")))
    answers = wait_for(shared, 1, 2)
    assert answers[1][0].kind == "AdapterError"
    assert len(answers[1][0].message) < 1000
    assert answers[2][0].kind == ""


def test_adapters_in_memory_hold_no_descriptors(shared: ProcessLoader, tmp_path: Path) -> None:
    """Else a server with a thousand adapters would run out of them."""
    path = write_adapter(tmp_path / "a")
    before = open_files()
    for version in range(1, 51):
        shared.submit(FetchJob(version, path))
    answers = wait_for(shared, *range(1, 51))
    assert open_files() <= before
    held = [pages for _, pages in answers.values() if pages is not None]
    assert len(held) == 50
    held[0][:] = 0  # private to its holder
    assert held[1].count_nonzero() > 0


STAGING = 64 * PAGE_BYTES


@pytest.fixture
def staged() -> Iterator[ProcessLoader]:
    """With staging memory, as on a GPU, but not pinned."""
    loader = ProcessLoader(CONTEXT, Staging(STAGING))
    yield loader
    loader.close()


def in_staging(loader: ProcessLoader, pages: torch.Tensor) -> bool:
    return 0 <= pages.data_ptr() - loader._staging._address < STAGING


def test_adapters_come_in_the_staging_memory(staged: ProcessLoader, tmp_path: Path) -> None:
    """No two adapters share a part of it, whatever their sizes, and a part is used again once no view of it is
    left."""
    held: dict[int, torch.Tensor] = {}
    paths = [write_adapter(tmp_path / str(i), rank=rank, seed=i) for i, rank in enumerate((30, 20, 8, 60))]
    expected = [fetch(FetchJob(0, path), CONTEXT, allocate_private)[1] for path in paths]
    before, random = open_files(), Random(0)
    used = 0
    for version in range(100):
        staged.submit(FetchJob(version, paths[version % 4]))
        held[version] = wait_for(staged, version)[version][1]
        used += in_staging(staged, held[version])
        if len(held) > 5:
            del held[random.choice(list(held))]
        for v, pages in held.items():
            assert torch.equal(pages, expected[v % 4])
    assert open_files() <= before
    assert used > 50, "parts of it have been used again and again"


@pytest.mark.slow
def test_what_has_no_room_in_it_comes_in_a_file(staged: ProcessLoader, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", rank=30)
    held = []
    for version in range(30):
        staged.submit(FetchJob(version, path))
        held.append(wait_for(staged, version)[version][1])
    fits = STAGING // held[0].nbytes
    assert 0 < fits < 30
    assert [in_staging(staged, pages) for pages in held] == [True] * fits + [False] * (30 - fits)
    expected = fetch(FetchJob(0, path), CONTEXT, allocate_private)[1]
    assert all(torch.equal(pages, expected) for pages in held)


def test_a_failed_load_leaves_the_staging_memory_zero(staged: ProcessLoader, tmp_path: Path) -> None:
    """It had been written to when the adapter turned out to be invalid."""
    path = write_adapter(tmp_path / "a", rank=20)
    broken = Path(write_adapter(tmp_path / "broken", rank=30))
    tensors = load_file(broken / "adapter_model.safetensors")
    tensors[max(tensors)][-1, -1] = torch.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    expected = fetch(FetchJob(0, path), CONTEXT, allocate_private)[1]
    for version in range(0, 60, 2):
        staged.submit(FetchJob(version, str(broken)))
        staged.submit(FetchJob(version + 1, path))
        answers = wait_for(staged, version, version + 1)
        assert answers[version][0].kind == "AdapterInvalid"
        pages = answers[version + 1][1]
        assert torch.equal(pages, expected)
    assert in_staging(staged, pages), "and none of it is lost"


def until_staged(loader: ProcessLoader, path: str, versions: Iterator[int]) -> torch.Tensor:
    """Load it until it comes in the staging memory."""
    end = time.monotonic() + SECONDS
    while True:
        version = next(versions)
        loader.submit(FetchJob(version, path))
        pages = wait_for(loader, version)[version][1]
        if in_staging(loader, pages):
            return pages
        assert time.monotonic() < end, "it is not used again"


@pytest.mark.slow
def test_after_a_death_the_staging_memory_is_used_again_once_no_view_is_left(
    staged: ProcessLoader, tmp_path: Path
) -> None:
    path, small = write_adapter(tmp_path / "a", rank=60, seed=1), write_adapter(tmp_path / "b", rank=20)
    expected, expected_small = (fetch(FetchJob(0, p), CONTEXT, allocate_private)[1] for p in (path, small))
    versions, held = itertools.count(), []
    while True:  # all of it has been written to
        held.append(until_staged(staged, path, versions))
        if len(held) == STAGING // held[0].nbytes:
            break
    staged._child.process.kill()
    staged._child.process.wait()
    del held[:-1]
    for version in (100, 101):
        staged.submit(FetchJob(version, small))
        pages = wait_for(staged, version)[version][1]
        assert not in_staging(staged, pages), "somebody still reads a part of it"
        assert torch.equal(pages, expected_small)
        assert torch.equal(held[0], expected)
    del held[:], pages
    assert torch.equal(until_staged(staged, small, itertools.count(200)), expected_small), "and it was zero"


@pytest.mark.slow
def test_the_staging_memory_outlives_the_loader(tmp_path: Path) -> None:
    before = open_files()
    loader = ProcessLoader(CONTEXT, Staging(STAGING))
    path = write_adapter(tmp_path / "a", rank=20)
    loader.submit(FetchJob(1, path))
    pages = wait_for(loader, 1)[1][1]
    loader.close()
    assert torch.equal(pages, fetch(FetchJob(0, path), CONTEXT, allocate_private)[1])
    del pages, loader
    assert open_files() <= before


def test_without_descriptors_a_job_fails_and_later_ones_work(shared: ProcessLoader, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    shared.submit(FetchJob(1, path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        ((result, pages),) = wait_for(shared, 1).values()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (result.kind, pages) == ("AdapterUnavailable", None)
    assert "descriptor" in result.message
    shared.submit(FetchJob(2, path))
    assert wait_for(shared, 2)[2][0].kind == ""


@pytest.mark.slow
def test_a_large_adapter(tmp_path: Path) -> None:
    """64 MiB in 256 KiB pages, over many sites."""
    width, layers = 1024, 16
    sites = tuple(
        LoraSite(i, i, "o_proj", width, (LoraSlice("o_proj", 0, width, "self_attn"),)) for i in range(layers)
    )
    context = FetchContext(replace(BASE, sites=sites), PackTarget(sites, torch.bfloat16, 1 << 18), AdapterLimits())
    path = write_adapter(tmp_path / "a", rank=1024, layers=layers, width=width)
    loader = ProcessLoader(context)
    try:
        loader.submit(FetchJob(1, path))
        result, pages = wait_for(loader, 1)[1]
    finally:
        loader.close()
    assert pages.numel() == 64 << 20
    expected, expected_pages = fetch(FetchJob(1, path), context, allocate_private)
    assert result == expected
    assert torch.equal(pages, expected_pages), "and it outlives the loader"


SERVE_ON_MANY_CORES = """
from multilora.adapters.loading import process
process.spare_cores = lambda at_most: 3
process.main()
"""


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with more cores than two: there are packing processes."""
    start = subprocess.Popen

    def popen(command: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        return start([command[0], "-c", SERVE_ON_MANY_CORES, command[-1]], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", popen)


@pytest.mark.slow
@pytest.mark.parametrize("staging", [0, STAGING])
def test_with_packing_processes(tmp_path: Path, many_cores: None, staging: int) -> None:
    """The same bytes, and they end with the loader however it ends."""
    paths = [write_adapter(tmp_path / str(i), rank=20 + i, seed=i) for i in range(6)]
    loader = ProcessLoader(CONTEXT, Staging(staging) if staging else None)
    try:
        for end in (signal.SIGKILL, None):
            for version, path in enumerate(paths):
                loader.submit(FetchJob(version, path))
            answers = wait_for(loader, *range(6))
            for version, path in enumerate(paths):
                expected, expected_pages = fetch(FetchJob(version, path), CONTEXT, allocate_private)
                assert answers[version][0] == expected
                assert torch.equal(answers[version][1], expected_pages)
            packers = psutil.Process(loader._child.process.pid).children()
            assert len(packers) == 3
            if end is not None:
                loader._child.process.send_signal(end)
                assert not psutil.wait_procs(packers, SECONDS)[1], "they outlive the loader"
                select.select([loader.fileno()], [], [], SECONDS)
                assert loader.poll() == [], "and another loader has been started"
    finally:
        loader.close()
    assert not psutil.wait_procs(packers, SECONDS)[1]


@pytest.mark.slow
def test_while_a_packing_process_of_the_dead_loader_is_left_the_next_gets_no_staging_memory(
    tmp_path: Path, many_cores: None
) -> None:
    path, versions = write_adapter(tmp_path / "a", rank=20), itertools.count()
    loader = ProcessLoader(CONTEXT, Staging(STAGING))
    try:
        expected = until_staged(loader, path, versions).clone()
        process = psutil.Process(loader._child.process.pid)
        left, *others = process.children()
        left.suspend()
        process.kill()
        assert not psutil.wait_procs(others, SECONDS)[1]
        assert loader._staging is not None and loader._staging.unused
        select.select([loader.fileno()], [], [], SECONDS)
        loader.poll()
        for _ in range(3):
            version = next(versions)
            loader.submit(FetchJob(version, path))
            pages = wait_for(loader, version)[version][1]
            assert torch.equal(pages, expected), "adapters come all the same"
            assert not in_staging(loader, pages)
        left.resume()
        assert not psutil.wait_procs([left], SECONDS)[1]
        assert torch.equal(until_staged(loader, path, versions), expected)
    finally:
        loader.close()


@pytest.mark.slow
def test_when_the_process_dies_the_next_one_does_what_was_pending(own: ProcessLoader, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    descriptor, process = own.fileno(), own._child.process
    for version in (1, 2, 3):
        own.submit(FetchJob(version, path))
    process.kill()  # it is still importing torch
    answers = wait_for(own, 1, 2, 3)
    assert {result.kind for result, _ in answers.values()} == {""}
    assert own.fileno() == descriptor, "whoever polls it knows it by this number"
    own.submit(FetchJob(4, path))
    assert wait_for(own, 4)[4][0].kind == ""
    assert not psutil.pid_exists(process.pid)


@pytest.mark.slow
def test_a_death_between_two_jobs_costs_nothing(own: ProcessLoader, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a")
    own._child.process.kill()
    own._child.process.wait()
    own.submit(FetchJob(1, path))
    assert wait_for(own, 1)[1][0].kind == ""


@pytest.mark.slow
def test_a_death_that_has_not_been_noticed_yet(own: ProcessLoader, tmp_path: Path, monkeypatch) -> None:
    """The process has closed its end but is not a zombie yet."""
    path = write_adapter(tmp_path / "a")
    own._child.process.kill()
    own._child.process.wait()
    monkeypatch.setattr(own._child.process, "poll", lambda: None)
    own.submit(FetchJob(1, path))
    assert wait_for(own, 1)[1][0].kind == ""


class Python:
    """In place of the loader: `code`, or the loader itself once it is None."""

    def __init__(self, code: str | None, start: Any):
        self.code, self.starts, self._start = code, 0, start

    def __call__(self, command: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        self.starts += 1
        if self.code == "refuse":
            raise OSError(11, "Resource temporarily unavailable")
        return self._start(command if self.code is None else [command[0], "-c", self.code], **kwargs)


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Python:
    made = Python("raise ImportError('no tensors here')", subprocess.Popen)
    monkeypatch.setattr(subprocess, "Popen", made)
    return made


def poll_until(loader: ProcessLoader, done: Callable[[], bool]) -> int:
    """As the engine does. How often the descriptor said that there is something."""
    end, woken = time.monotonic() + SECONDS, 0
    while not done():
        assert time.monotonic() < end
        woken += bool(select.select([loader.fileno()], [], [], 0.02)[0])
        assert loader.poll() == []
    return woken


ENDS = {
    "raise ImportError('no tensors here')": r"ended with exit code 1: ImportError: no tensors here; ",
    "import os; os.kill(os.getpid(), 9)": r"ended with signal 9 \(SIGKILL\); ",
    "refuse": r"could not be started: \[Errno 11\] Resource temporarily unavailable; ",
}


@pytest.mark.slow
@pytest.mark.parametrize("code", ENDS)
def test_a_process_that_always_dies_at_its_start(
    code: str, python: Python, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is started after a pause, which grows, and each start is logged once; what is asked for meanwhile waits, but
    not for long, and says why; once it starts, everything works again."""
    monkeypatch.setattr(child_process, "FIRST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(child_process, "LONGEST_PAUSE_SECONDS", 0.8)
    path = write_adapter(tmp_path / "a")
    loader = ProcessLoader(CONTEXT)
    try:
        python.code = code
        loader._child.process.kill()  # it is still importing torch
        descriptor, begun = loader.fileno(), time.monotonic()
        woken = poll_until(loader, lambda: python.starts == 4)
        assert time.monotonic() - begun >= 0.2 + 0.4
        poll_until(loader, lambda: loader._restarts.seconds_left > 0)
        assert woken <= python.starts, "no busy loop"
        errors = [record for record in caplog.records if "; starting another" in record.message]
        assert len(errors) == python.starts
        loader.submit(FetchJob(0, path))
        assert loader.poll() == [], "it waits"
        monkeypatch.setattr("multilora.adapters.loading.process.WAIT_SECONDS", 0.0)
        loader.submit(FetchJob(1, path))
        kept = loader._waiting.popleft()
        ((result, pages),) = loader.poll()
        loader._waiting.append(kept)
        assert (result.version, result.kind, pages) == (1, "AdapterUnavailable", None)
        assert re.search("the loader process cannot be started: 4 times in a row it " + ENDS[code], result.message)
        assert "memory limit" in result.message
        python.code = None
        assert wait_for(loader, 0)[0][0].kind == "", "what has waited all the time"
        loader.submit(FetchJob(2, path))
        assert wait_for(loader, 2)[2][0].kind == ""
        assert loader.fileno() == descriptor
    finally:
        loader.close()


@pytest.mark.slow
def test_what_two_processes_had_to_do_when_they_died_at_their_start_fails(python: Python, tmp_path: Path) -> None:
    python.code = "import time; time.sleep(0.2); raise ImportError('no tensors here')"
    loader = ProcessLoader(CONTEXT)
    try:
        for first in (1, 4):
            for version in range(first, first + 3):
                loader.submit(FetchJob(version, str(tmp_path)))
            answers = wait_for(loader, *range(first, first + 3))
            assert {result.kind for result, _ in answers.values()} == {"AdapterUnavailable"}
            assert all("ImportError: no tensors here" in result.message for result, _ in answers.values())
        assert "cannot be started: 4 times in a row" in answers[4][0].message
    finally:
        loader.close()


@pytest.mark.slow
def test_in_a_pause_released_parts_are_not_sent(
    python: Python, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing reads the socket, so that sending would block in the end."""
    monkeypatch.setattr(child_process, "FIRST_PAUSE_SECONDS", 60.0)
    python.code = None
    loader = ProcessLoader(CONTEXT, Staging(STAGING))
    starts = loader._restarts
    try:
        pages = until_staged(loader, write_adapter(tmp_path / "a"), itertools.count())
        python.code = "raise ImportError('no tensors here')"
        loader._child.process.kill()
        poll_until(loader, lambda: starts.seconds_left > 0)
        with pytest.raises(OSError, match="not connected"):
            loader._socket.send(b"part")
        del pages
        assert loader._staging is not None and loader._staging.unused
    finally:
        loader.close()


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """All that the limit allows are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as taken:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.callback(os.close, os.dup(0))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("noticed_by", ["poll", "submit"])
def test_no_descriptor_is_left_when_it_dies(
    own: ProcessLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noticed_by: str
) -> None:
    """A start that fails like any other: pending jobs wait, the polled descriptor is silent, and later all works
    again."""
    monkeypatch.setattr(child_process, "FIRST_PAUSE_SECONDS", 0.3)
    path = write_adapter(tmp_path / "a")
    descriptor, before = own.fileno(), open_files()
    own.submit(FetchJob(1, path))
    own._child.process.kill()
    own._child.process.wait()
    answers: list[tuple[Fetched, torch.Tensor | None]] = []
    with no_descriptor_left():
        if noticed_by == "submit":
            own.submit(FetchJob(2, path))
        for _ in range(10):
            answers += own.poll()
        assert not select.select([descriptor], [], [], 0)[0], "no busy loop"
    assert answers == []
    assert "could not be started: [Errno 24] Too many open files" in own._restarts.explanation()
    poll_until(own, lambda: not own._child.ended)
    own.submit(FetchJob(3, path))
    asked = {1, 3} | ({2} if noticed_by == "submit" else set())
    assert {result.kind for result, _ in wait_for(own, *asked).values()} == {""}
    assert own.fileno() == descriptor
    assert open_files() <= before


@pytest.mark.slow
@pytest.mark.parametrize(("staging", "noticed_by"), [(0, "submit"), (STAGING, "submit"), (STAGING, "poll")])
def test_what_the_process_had_answered_before_it_died_counts(tmp_path: Path, staging: int, noticed_by: str) -> None:
    """The answer lies there, unread, also when it is a new job that finds it dead; and the process was of use."""
    path = write_adapter(tmp_path / "a")
    loader = ProcessLoader(CONTEXT, Staging(staging) if staging else None)
    try:
        before = open_files()
        loader.submit(FetchJob(1, path))
        assert select.select([loader.fileno()], [], [], SECONDS)[0]
        os.kill(loader._child.process.pid, signal.SIGSTOP)
        loader.submit(FetchJob(2, path))  # it does not read that: the system says so, before what it had sent
        loader._child.process.kill()
        loader._child.process.wait()
        answers = wait_for(loader, 1, 2) if noticed_by == "poll" else {}
        loader.submit(FetchJob(3, path))
        answers |= wait_for(loader, *({1, 2, 3} - answers.keys()))
        assert [answers[version][0].kind for version in (1, 2, 3)] == ["", "", ""]
        expected = fetch(FetchJob(0, path), CONTEXT, allocate_private)[1]
        assert torch.equal(answers[1][1], expected) and torch.equal(answers[3][1], expected)
        assert not staging or in_staging(loader, answers[1][1])
        assert loader._restarts._failed == 0
        del answers
        poll_until(loader, lambda: not loader._predecessors)
        assert open_files() <= before
    finally:
        loader.close()


@pytest.mark.slow
def test_a_death_that_is_noticed_late_is_one_at_its_start_all_the_same(
    python: Python, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has answered nothing counts as a failed start, however late its end is noticed."""
    clock, late = time.monotonic, 0.0
    monkeypatch.setattr(child_process, "monotonic", lambda: clock() + late)
    loader = ProcessLoader(CONTEXT)
    try:
        for start in (1, 2, 3):
            loader._child.process.wait()
            late += 1000.0
            loader.poll()
            assert loader._restarts._failed == start
            late += 1000.0
            loader.poll()
    finally:
        loader.close()


def test_close_during_a_pause_leaves_no_descriptor(python: Python) -> None:
    before = open_files()
    loader = ProcessLoader(CONTEXT, Staging(STAGING))
    starts = loader._restarts
    poll_until(loader, lambda: starts.seconds_left > 0)
    loader.close()
    loader.close()
    del loader  # and its staging memory
    assert open_files() <= before


def test_close_leaves_neither_process_nor_descriptor() -> None:
    before = open_files()
    loader = ProcessLoader(CONTEXT)
    loader.submit(FetchJob(1, "/missing"))
    process = psutil.Process(loader._child.process.pid)
    loader.close()
    loader.close()
    assert not process.is_running()
    assert open_files() <= before


@pytest.mark.slow
def test_close_does_not_wait_for_a_process_that_hangs() -> None:
    loader = ProcessLoader(CONTEXT)
    os.kill(loader._child.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 5
    assert loader._child.process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_the_process_ends_with_its_engine(own: ProcessLoader) -> None:
    """As when the engine is killed: its end of the socket closes by itself."""
    own._socket.shutdown(2)
    assert own._child.process.wait(SECONDS) == 0


SERVE_HANGING_DOWNLOADS = """
import time
from multilora.adapters.loading import fetch_server, process

def hang(job, *others):
    open(job.path, "w").close()
    time.sleep(600)

fetch_server.fetch = hang
process.spare_cores = lambda at_most: 3
process.main()
"""


@pytest.mark.slow
def test_the_process_ends_with_its_engine_in_the_middle_of_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is left to kill it when the engine was; and the staging memory stays as long as it does."""
    start, begun = subprocess.Popen, [tmp_path / str(i) for i in range(2)]
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **kw: start([command[0], "-c", SERVE_HANGING_DOWNLOADS, command[-1]], **kw),
    )
    loader = ProcessLoader(CONTEXT, Staging(STAGING))
    try:
        for version, path in enumerate(begun):
            loader.submit(FetchJob(version, str(path)))
        poll_until(loader, lambda: all(path.exists() for path in begun))
        packers = psutil.Process(loader._child.process.pid).children()
        loader._socket.shutdown(2)
        assert loader._child.process.wait(3) == 0
        assert len(packers) == 3 and not psutil.wait_procs(packers, 3)[1]
        loader._child.end()
        assert loader._child.gone() and loader._child.describe_end() == "ended with exit code 0"
    finally:
        loader.close()


def test_pages_have_the_page_size(shared: ProcessLoader, tmp_path: Path) -> None:
    shared.submit(FetchJob(1, write_adapter(tmp_path / "a", rank=30)))
    assert wait_for(shared, 1)[1][1].shape == (4, PAGE_BYTES)


def test_a_job_that_the_loader_could_not_read_whole(shared: ProcessLoader, tmp_path: Path) -> None:
    """The system would carry it, but the other end reads a message only so far."""
    process = shared._child.process.pid
    shared.submit(FetchJob(1, "x" * (3 << 19)))
    shared.submit(FetchJob(2, write_adapter(tmp_path / "a")))
    answers = wait_for(shared, 1, 2)
    assert [answers[v][0].kind for v in (1, 2)] == ["AdapterError", ""]
    assert shared._child.process.pid == process


@pytest.mark.slow
def test_a_thousand_jobs_at_once(shared: ProcessLoader, tmp_path: Path) -> None:
    """More than the sockets hold, in both directions."""
    for version in range(1000):
        shared.submit(FetchJob(version, "/missing/" + "x" * 500))
    answers = wait_for(shared, *range(1000))
    assert {result.kind for result, _ in answers.values()} == {"AdapterNotFound"}
