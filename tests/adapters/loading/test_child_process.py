"""A child process as its parent sees it: how it ended, its stderr, what it forked, and when another may start."""

import os
import sys
import time
from collections.abc import Callable

import pytest

from multilora.adapters.loading import child_process as module
from multilora.adapters.loading.child_process import ChildProcess, RestartPolicy


def life_of(code: str) -> ChildProcess:
    return ChildProcess([sys.executable, "-c", code], [], os.environ)


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("pass", "ended with exit code 0"),
        ("raise ImportError('no tensors')", "ended with exit code 1: ImportError: no tensors"),
        ("import sys; print('first\\n last \\n', file=sys.stderr); sys.exit(3)", "ended with exit code 3: last"),
        ("import os; os.kill(os.getpid(), 9)", "ended with signal 9 (SIGKILL)"),
        ("import os; os.kill(os.getpid(), 40)", "ended with signal 40 (no name)"),
        ("import os; os.write(2, b'\\xff' * 9999)", "ended with exit code 0: " + "\ufffd" * 300),
    ],
)
def test_how_it_ended(code: str, how: str) -> None:
    child = life_of(code)
    child.end()
    assert child.ended and child.describe_end() == how
    child.close()


def test_what_it_writes_is_handed_on(capfd: pytest.CaptureFixture[str]) -> None:
    """All of it, in order, also when it is more than a pipe holds."""
    child = life_of("import sys; print('\\n'.join(map(str, range(50_000))), file=sys.stderr)")
    while child.process.poll() is None:
        child.listen()
    child.end()
    child.close()
    assert capfd.readouterr().err == "".join(f"{i}\n" for i in range(50_000))
    assert child.describe_end() == "ended with exit code 0: 49999"


def test_it_is_gone_when_all_that_it_forked_are() -> None:
    before = len(os.listdir("/proc/self/fd"))
    child = life_of("import os, time; os.fork() or time.sleep(0.5)")
    child.process.wait(10)
    child.end()
    assert not child.gone()
    until(child.gone)
    child.close()
    child.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "END_SECONDS", 0.1)
    child = life_of("import time; time.sleep(100)")
    child.end()
    assert child.describe_end() == "ended with signal 9 (SIGKILL)"
    child.close()


def test_one_that_cannot_be_started_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        ChildProcess(["/no such program"], [], os.environ)
    assert len(os.listdir("/proc/self/fd")) == before


def test_pauses_grow_to_a_limit_and_begin_anew_after_a_good_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    restarts = RestartPolicy()
    pauses = [restarts.ended("ended", useful=False) for _ in range(2000)]
    assert pauses[:10] == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60] and set(pauses[10:]) == {60.0}
    assert restarts.seconds_left == 60
    now += 59
    assert restarts.seconds_left == 1 and "next try in 1 s" in restarts.explanation()
    now += 2
    assert restarts.seconds_left == 0
    assert restarts.ended("ended well", useful=True) == 0
    assert restarts.explanation() == "the loader process ended well; try again"
    assert [restarts.ended("ended", useful=False) for _ in range(3)] == [0, 1, 2]
