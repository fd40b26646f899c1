"""The random numbers of sampling: pure functions of (seed, position), so nothing else can matter.

Counter-based: SplitMix64's output function (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
OOPSLA 2014; constants of Stafford's variant 13) over `mix(seed) + (position + 1) · golden gamma`. The seed is mixed
first, because requests like to use neighbouring seeds. Integer arithmetic on the host: the same on every device
and, as golden numbers in the tests promise, in every release. Called by `engine/sampling/batch.py`.
"""

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_MASK64 = (1 << 64) - 1


def mixed_seed(seed: int) -> np.uint64:
    """The stream of a seed, which is taken modulo 2^64."""
    stream: np.uint64 = _mix(np.array([seed & _MASK64], dtype=np.uint64) + _GAMMA)[0]
    return stream


def uniforms(streams: npt.NDArray[np.uint64], positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """[n] numbers in [0, 1) with 53 random bits. `streams` come from `mixed_seed`; positions are 0 or more."""
    state = streams + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 64-bit words; arrays wrap around silently, which is what is wanted."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
