"""A stranger's path, from the wheel to an answer by the openai client, as `scripts/first_minute.py` walks it."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_WHEEL_BYTES = 12 << 20
STEPS = (
    "environment",
    "pip install torch",
    "pip install multilora",
    "multilora demo",
    "pip install openai",
    "an adapter",
    "multilora serve",
    "openai client",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    [found] = folder.glob("multilora-*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < MOST_WHEEL_BYTES


@pytest.mark.slow
def test_wheel_demo_own_adapter_openai_client(wheel, capfd):
    """Installs into an environment of its own, so it needs a package index, and minutes."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "scripts" / "first_minute.py"), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    with capfd.disabled():
        sys.stdout.write(f"\n{done.stdout}all of it                {time.monotonic() - began:6.1f} s\n")
    assert done.returncode == 0, done.stderr
    took = dict(re.findall(r"^(\S[^\n]*?) +(\d+\.\d) s$", done.stdout, re.M))
    assert tuple(took) == STEPS
    assert "mine: Arr, the capital o' France be Paris, matey!" in done.stdout
    assert "multilora-demo: " in done.stdout
