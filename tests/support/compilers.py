"""Runs one of the `compile_*.py` beside this file, without the interpreter that the tests have Triton use."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]


def compile_elsewhere(script: str, *names: str, lines: str = "") -> list[str]:
    """What it prints, by line. lines: for its stdin. It is to end well: the interpreter takes much that the compiler
    does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(SUPPORT / script), *names]
    done = subprocess.run(
        command, input=lines, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
