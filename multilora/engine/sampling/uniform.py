"""The random numbers of sampling: `uniforms(seeds, positions)`, a pure function, so nothing else can matter.

Counter-based: SplitMix64's output function (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
OOPSLA 2014; constants of Stafford's variant 13) over `mix(seed) + (position + 1) · golden gamma`. The seed is mixed
first, because requests like to use neighbouring seeds. Integer arithmetic on the host: the same on every device
and, as golden numbers in the tests promise, in every release. Called by `engine/sampling/sampler.py`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_MASK64 = (1 << 64) - 1


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """[n] numbers in [0, 1) with 53 random bits. Seeds are taken modulo 2^64; positions are 0 or more."""
    seed = np.array([s & _MASK64 for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    state = _mix(seed + _GAMMA) + (position + np.uint64(1)) * _GAMMA
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 64-bit words; arrays wrap around silently, which is what is wanted."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
