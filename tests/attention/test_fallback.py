"""Prompts by Triton's kernels until FlashInfer's are compiled: when that changes, and what happens if it cannot.

FlashInfer is a fake here; `test_flashinfer.py` has both on a GPU.
"""

import importlib
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import multilora.attention
from multilora.attention.base import AttentionShape
from multilora.attention.fallback import LOWEST_PRIORITY, BackgroundBuild, FallbackPrefill, reason
from multilora.batch import AttentionMeta
from multilora.memory.kv_layout import KVLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parents[2]
SOON = 20.0  # seconds
NOTHING = torch.empty(0)
REQUESTS = np.zeros((5, 0), np.int32)
SHAPE = AttentionShape(2, 1, 64, 0.5, None)
NINJA = """Ninja build failed. Ninja output:
ninja: Entering directory `/cache'
[1/9] /usr/local/cuda/bin/nvcc -DERROR_LIMIT=3 --error-limit -c a.cu -o a.o
FAILED: a.o
a.cu(3): error: identifier "x" is undefined
ninja: build stopped: subcommand failed.
"""


class Recorded:
    """A prefill that notes what it is asked for."""

    def __init__(self, name: str, calls: list[str]):
        self._name, self._calls = name, calls

    def plan(self, q_lens: Any, requests: Any, indices: Any) -> None:
        self._calls.append(f"{self._name} plan")

    def run(self, q: Any, kv: Any, out: Any, layer: int, sinks: Any) -> None:
        self._calls.append(f"{self._name} {layer}")
        out.zero_()

    def compile(self) -> None:
        self._calls.append(f"{self._name} compile")


class Gate:
    """A build that lasts until it is let go, and then fails with `error` if there is one."""

    def __init__(self, error: Exception | None = None):
        self._error, self._open = error, threading.Event()
        self.times = 0
        self.priority = 0

    def __call__(self, *arguments: Any) -> None:
        self.times += 1
        self.priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert self._open.wait(SOON)
        if self._error is not None:
            raise self._error

    def let_go(self) -> None:
        self._open.set()


def made(gate: Gate) -> tuple[BackgroundBuild, FallbackPrefill, list[str]]:
    calls: list[str] = []
    build = BackgroundBuild("FlashInfer's kernels", gate)
    return build, FallbackPrefill(Recorded("flashinfer", calls), Recorded("triton", calls), build), calls


def plan(prefill: FallbackPrefill) -> None:
    prefill.plan([2], REQUESTS, NOTHING)


def run(prefill: FallbackPrefill, layer: int) -> None:
    prefill.run(NOTHING, (NOTHING, NOTHING), NOTHING, layer, None)


def test_it_changes_between_two_steps_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    with caplog.at_level(logging.INFO, "multilora.attention"):
        build, prefill, calls = made(gate)
        plan(prefill)
        run(prefill, 0)
        gate.let_go()
        build.join(SOON)
        assert build.ready
        run(prefill, 1)  # the rest of a step that was planned before
        plan(prefill)
        run(prefill, 0)
        run(prefill, 1)
    assert calls == ["triton plan", "triton 0", "triton 1", "flashinfer plan", "flashinfer 0", "flashinfer 1"]
    begun, done = caplog.messages
    assert "compiling FlashInfer's kernels beside the engine" in begun
    assert "FlashInfer's kernels are compiled (0 s); the next prompt goes through them" in done


def test_a_build_that_fails_leaves_the_fallback_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(RuntimeError(NINJA))
    build, prefill, calls = made(gate)
    other = FallbackPrefill(Recorded("other", calls), Recorded("triton", calls), build)
    gate.let_go()
    build.join(SOON)
    assert not build.ready
    for _ in range(2):
        plan(prefill)
        run(prefill, 0)
        plan(other)
    assert calls == ["triton plan", "triton 0", "triton plan"] * 2
    [warning] = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("FlashInfer's kernels cannot be compiled, so prompts stay with Triton's: ")
    assert warning.endswith('a.cu(3): error: identifier "x" is undefined')


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "ninja"), "[Errno 2] No such file or directory: 'ninja'"),
        (RuntimeError("Ninja build failed.\n/bin/sh: 1: nvcc: not found\n"), "/bin/sh: 1: nvcc: not found"),
        (RuntimeError("no nvcc\nbelow"), "no nvcc"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("x" * 1000), "x" * 300),
    ],
)
def test_the_reason_is_a_line(error: Exception, line: str) -> None:
    assert reason(error) == line


def test_it_builds_when_nothing_else_wants_the_cores() -> None:
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    gate = Gate()
    build, _, _ = made(gate)
    gate.let_go()
    build.join(SOON)
    assert gate.priority == LOWEST_PRIORITY
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


@pytest.mark.slow
def test_the_end_of_the_process_does_not_wait_for_it() -> None:
    """What is built writes to a pipe and ends with it, as ninja does."""
    code = """
        import subprocess, time
        from multilora.attention.fallback import BackgroundBuild
        command = ["sh", "-c", "while echo; do sleep 0.1; done"]
        build = BackgroundBuild("x", lambda: subprocess.run(command, stdout=subprocess.PIPE, text=True))
        time.sleep(0.3)
        print(build.ready)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


# ---------------------------------------------------------------------- the backend that has both


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """`multilora.attention.flashinfer` over a fake FlashInfer, whose kernels are in tmp_path and built by `gate`.
    calls: those of the prefills."""
    gate, calls = Gate(), []
    fakes: dict[str, dict[str, Any]] = {
        "flashinfer": {"BatchPrefillWithPagedKVCacheWrapper": None},
        "flashinfer.jit": {"env": SimpleNamespace(FLASHINFER_JIT_DIR=tmp_path), "get_batch_prefill_uri": uri},
        "flashinfer.prefill": {"get_batch_prefill_module": gate},
        "flashinfer.utils": {"determine_attention_backend": lambda *arguments: "fa3"},
    }
    for name, contents in fakes.items():
        fake = ModuleType(name)
        vars(fake).update(contents)
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delitem(sys.modules, "multilora.attention.flashinfer", raising=False)
    monkeypatch.setattr(multilora.attention, "flashinfer", None, raising=False)  # put back at the end
    module = importlib.import_module("multilora.attention.flashinfer")
    monkeypatch.setattr(module, "_FlashInferPrefill", lambda shape, view: Recorded("flashinfer", calls))
    monkeypatch.setattr(module, "TritonPrefill", lambda shape, view: Recorded("triton", calls))
    yield SimpleNamespace(module=module, gate=gate, calls=calls, folder=tmp_path)
    gate.let_go()
    sys.modules.pop("multilora.attention.flashinfer", None)


def uri(backend: str, *kernels: Any) -> str:
    return "_".join(map(str, kernels)) + ("_sm90" if backend == "fa3" else "")


def attention(backend: Any, **options: Any) -> Any:
    layout = KVLayout(2, 4, 1, 64, torch.float16)
    views = layout.views(torch.zeros(3, layout.page_bytes, dtype=torch.uint8, device=DEVICE))
    return backend.module.FlashInferAttention(views, SHAPE, **options)


def step(attention: Any) -> None:
    """A prompt of six tokens."""
    zeros = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    attention.prepare(AttentionMeta((6,), (6,), torch.tensor([[0, 1]], device=DEVICE), zeros, zeros))
    q, k, v = torch.zeros(6, 4, 64, dtype=torch.float16, device=DEVICE).split([2, 1, 1], dim=1)
    rope = torch.ones(6, 1, 32, device=DEVICE), torch.zeros(6, 1, 32, device=DEVICE)
    for layer in (0, 1):
        attention.forward(layer, q, k, v, rope)


def test_by_name_it_waits_for_the_compiler(backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "multilora.attention"):
        found = attention(backend)
    assert backend.calls == ["flashinfer compile"] and backend.gate.times == 0
    assert found.name == "flashinfer"
    assert caplog.messages == ["compiling attention kernels, once (one to three minutes)"]


@pytest.mark.parametrize("wait", [False, True])
def test_what_is_compiled_serves_at_once(backend: Any, wait: bool, caplog: pytest.LogCaptureFixture) -> None:
    name = uri("fa3", torch.float16, torch.float16, torch.float16, torch.int32, 64, 64, 0, False, False, False)
    (backend.folder / name).mkdir()
    (backend.folder / name / "it.so").touch()
    with caplog.at_level(logging.INFO, "multilora.attention"):
        found = attention(backend, wait=wait)
    assert backend.calls == ["flashinfer compile"] and caplog.messages == []
    assert found.name == "flashinfer"


def test_else_triton_serves_until_one_build_for_all_is_done(backend: Any) -> None:
    measured = attention(backend, wait=False)  # what the largest step is measured with
    found = attention(backend, wait=False)
    assert found.name == "flashinfer (triton until its kernels are compiled)"
    step(found)
    assert backend.calls == ["triton plan", "triton 0", "triton 1"]
    backend.gate.let_go()
    for each in (measured, found):
        each._prefills[0]._build.join(SOON)
        backend.calls.clear()
        step(each)
        assert backend.calls == ["flashinfer plan", "flashinfer 0", "flashinfer 1"]
    assert backend.gate.times == 1
