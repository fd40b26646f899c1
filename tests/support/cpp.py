"""What tests of the CPU's C++ need to know: whether this machine has a compiler for it."""

import pytest

from multilora.kernels.cpp.library import obstacle

OBSTACLE = obstacle()
NEEDS_CPP = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
ON_CPU = "torch" if OBSTACLE else "cpp"
"""What `auto` takes for LoRA and attention."""
