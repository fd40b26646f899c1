"""A process that steps back for the server's: its session, its weight, and that of its session."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/self/autogroup")


def said(code: str) -> str:
    begin = "import os\nfrom multilora.drivers.background import stand_aside\nstand_aside()\n"
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, check=True).stdout


def test_it_has_a_session_of_its_own_and_less_weight():
    weight = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
    code = "print(os.getsid(0) == os.getpid(), os.getpriority(os.PRIO_PROCESS, 0))"
    assert said(code).split() == ["True", str(weight)]


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this system shares out cores by process")
def test_its_session_has_less_weight():
    assert said("print(open('/proc/self/autogroup').read())").strip().endswith("nice 5")
