"""Without a GPU, Triton kernels run in Triton's interpreter: it has to be chosen before anything imports Triton. Of
several workers each computes on one core, and so do its processes: that has to be said before anything imports torch.

And what several packages' tests share.
"""

import gc
import logging
import os
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would wait for each other on the workers' cores

import quick_routes
import torch
from hypothesis import settings

from multilora import logs
from multilora.kernels.cpp import library
from multilora.layers.ops import small_ops

if TYPE_CHECKING:
    from peft_rows import Lab

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()

quick_routes.install()

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[None]:
    """Modules and tests live until the end: the garbage collector need not look at them, neither now nor later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """What libraries free at the very end is freed."""
    gc.unfreeze()


@pytest.fixture
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU without C++, for references in torch that have the same bits: what is rounded to 8 bits on the way moves
    by a whole step when a number falls on the other side. Ranks, processes of their own, find no compiler."""
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setattr(library, "_load", lambda: "there is no C++ compiler (no-compiler)")
    small_ops.cache_clear()
    yield
    small_ops.cache_clear()


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """`logs.setup`, which commands call, sets a level and a handler for the whole process."""
    root, ours = logging.getLogger(), logging.getLogger("multilora")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers = [h for h in root.handlers if h in handlers or not isinstance(h, logs.Handler | logs.RecentLines)]
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> "Lab":
    """One small adapter for each thing that PEFT can save, made when it is asked for (`tests/support`)."""
    from peft_rows import Lab

    return Lab(tmp_path_factory.mktemp("peft"))


@pytest.fixture(autouse=True, scope="session")
def _grammars_in_process() -> Iterator[None]:
    """The pool of processes, which takes seconds to start, is tested in `drivers/test_grammar_pool.py`."""
    from fakes.grammars import InProcessGrammars

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multilora.drivers.request_driver.GrammarPool", InProcessGrammars)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the sum of what tests have counted by `record_property("counted", …)`, of all the processes that ran
    them: what `make fuzz` has really sent and read."""
    total: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "teardown":
                for name, counts in report.user_properties:
                    if name == "counted":
                        total.update(counts)
    if total:
        terminalreporter.write_line("counted: " + ", ".join(f"{n:,} {what}" for what, n in sorted(total.items())))
