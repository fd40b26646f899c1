"""The C++ of this directory as a library: compiled for this CPU when it is first needed, and kept.

A step on a CPU spends more time between its products than in them if each operation is a call of torch. The functions
have a C interface, so that torch's headers are not needed, with which a compiler is busy for a minute: it takes ten
seconds. Called by `lora/cpp_backend.py`, `attention/cpp_attention.py`, `layers/cpp_ops.py` and, for what it takes, by
those that choose them.

The library is kept in $XDG_CACHE_HOME/multilora (~/.cache/multilora), under a name that says what it was made of: the
sources, the compiler, its flags, the CPU and the OpenMP. That directory has to be this user's alone, for what lies
there is executed.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path

import torch

from multilora.errors import ConfigError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC")
COMPILERS = ("g++", "clang++")
COMPILE_SECONDS = 300

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the functions take, and the numbers that they know them by (`Dtype` of `numbers.h`)."""

_ARGUMENTS = {
    "set_num_threads": (c_int64,),
    "add_lora": (
        c_void_p,
        c_void_p,
        c_int64,
        c_int64,
        c_void_p,
        c_int64,
        c_int64,
        c_void_p,
        c_int64,
        c_int64,
        c_int64,
    ),
    "rms_norm": (
        *(c_void_p, *(c_int64,) * 5),
        *(c_void_p, c_void_p, c_double, c_int64),
        *(c_void_p, c_void_p, c_int64),
    ),
    "few_rows": (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p),
    "silu_and_mul": (c_void_p, c_int64, c_int64, c_void_p, c_int64),
    "rotate_and_store": (c_void_p, c_int64, *(c_void_p, c_int64) * 3, *(c_void_p,) * 8),
    "decode": (c_void_p, c_int64, *(c_void_p,) * 6, c_int64, *(c_void_p,) * 4),
}


def obstacle() -> str | None:
    """What keeps the library from this machine, in one line; None: nothing does, and it is there."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    """The functions; ConfigError where there is an `obstacle`."""
    found = _load()
    if isinstance(found, str):
        raise ConfigError(found)
    return found


@functools.cache
def _load() -> ctypes.CDLL | str:
    if os.name != "posix":
        return "the C++ kernels are made for Linux"
    named = os.environ.get("CXX")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return f"there is no C++ compiler ({named or ' or '.join(COMPILERS)})"
    try:
        path = _compiled(compiler)
        loaded = ctypes.CDLL(str(path))
    except (OSError, _CompileError) as e:
        return f"the C++ kernels cannot be compiled or loaded: {e}"
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    loaded.set_num_threads(torch.get_num_threads())
    return loaded


class _CompileError(Exception):
    """What the compiler said."""


def _compiled(compiler: str) -> Path:
    """The library's file, which is made if it is not there yet. Processes that need it at once wait for one."""
    sources = sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))
    openmp = _openmp_of_torch()
    made_of = [compiler, *FLAGS, str(openmp), _cpu(), _run([compiler, "--version"])]
    made_of += [f"{source.name}\n{source.read_text()}" for source in sources]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:32]
    folder = _cache()
    path = folder / f"kernels-{digest}.so"
    with _locked(folder / "kernels.lock"):
        if not path.exists():
            logger.info("compiling the C++ kernels with %s", compiler)
            _compile(compiler, [source for source in sources if source.suffix == ".cpp"], openmp, path)
    return path


def _compile(compiler: str, sources: list[Path], openmp: Path | None, path: Path) -> None:
    """All sources at once, then the library, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        objects = [Path(made) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *FLAGS, "-fopenmp", "-c", str(source), "-o", str(out)]
            for source, out in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(_run, commands))
        linked = Path(made) / path.name
        threads = "-fopenmp" if openmp is None else str(openmp)
        _run([compiler, "-shared", *map(str, objects), threads, "-o", str(linked)])
        linked.replace(path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as e:
        raise _CompileError(f"{command[0]} took more than {COMPILE_SECONDS} s") from e
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise _CompileError((errors or done.stderr.splitlines() or [f"exit {done.returncode}"])[0])
    return done.stdout


def _openmp_of_torch() -> Path | None:
    """The OpenMP that torch has loaded. With another one beside it, the threads of both would want the cores."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = Path(line.split(maxsplit=5)[-1])
            if path.name.startswith(("libgomp", "libiomp5", "libomp")):
                return path
    return None


def _cpu() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() or platform.machine()


def _cache() -> Path:
    """Where libraries are kept; raises OSError unless only this user can write there."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(root, "multilora")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} has to be this user's, and nobody else may write there")
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
