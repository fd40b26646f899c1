"""Making the library: once, for what it is made of, and one clear line where it cannot be made."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cpp import NEEDS_CPP

from multilora.errors import ConfigError
from multilora.kernels.cpp import library

PRINT_OBSTACLE = "from multilora.kernels.cpp.library import obstacle; print(obstacle())"


def obstacle(cache: Path, **environment: str) -> str:
    """What a new process finds in its way."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    done = subprocess.run([sys.executable, "-c", PRINT_OBSTACLE], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@NEEDS_CPP
@pytest.mark.slow
def test_processes_that_need_it_at_once_share_one(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    counting = compiler(tmp_path / "cxx", f'echo "$@" >> {log}; exec g++ "$@"')
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: obstacle(tmp_path / "cache", CXX=counting), range(3)))
    assert found == ["None"] * 3
    calls = log.read_text().splitlines()
    assert sum("-shared" in call for call in calls) == 1
    assert sum("-c" in call.split() for call in calls) == len(list(library.SOURCES.glob("*.cpp")))
    kept = [path.name for path in (tmp_path / "cache" / "multilora").iterdir()]
    assert sorted(name.partition("-")[0] for name in kept) == ["kernels", "kernels.lock"]


def test_no_compiler(tmp_path: Path) -> None:
    assert obstacle(tmp_path, CXX="no-such-compiler") == "there is no C++ compiler (no-such-compiler)"
    assert obstacle(tmp_path, CXX="", PATH="/nowhere") == "there is no C++ compiler (g++ or clang++)"


def test_what_the_compiler_says_is_one_line(tmp_path: Path) -> None:
    failing = compiler(
        tmp_path / "cxx",
        'case "$*" in *--version*) exit 0;; esac; echo "in file" >&2; echo "a.h:1: error: bad" >&2; exit 3',
    )
    said = obstacle(tmp_path / "cache", CXX=failing)
    assert said == "the C++ kernels cannot be compiled or loaded: a.h:1: error: bad"
    assert [path.name for path in (tmp_path / "cache" / "multilora").iterdir()] == ["kernels.lock"]


def test_a_cache_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "multilora"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    said = obstacle(tmp_path / "cache", CXX=compiler(tmp_path / "cxx", "echo 1.0"))
    assert "has to be this user's, and nobody else may write there" in said
    assert list(cache.iterdir()) == []


def test_another_compiler_or_cpu_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Path] = []

    def compile_nothing(_compiler: str, _sources: list[Path], _openmp: Path | None, path: Path) -> None:
        made.append(path)
        path.touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_compile", compile_nothing)
    version = compiler(tmp_path / "cxx", "echo 1.0")
    for _ in range(2):
        library._compiled(version)
    assert len(made) == 1
    monkeypatch.setattr(library, "_cpu", lambda: "another")
    library._compiled(version)
    compiler(tmp_path / "cxx", "echo 2.0")
    library._compiled(version)
    assert len(set(made)) == len(made) == 3


def test_by_name_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: "there is no C++ compiler (g++ or clang++)")
    with pytest.raises(ConfigError, match="no C"):
        library.library()
