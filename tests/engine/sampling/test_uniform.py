import numpy as np

from multilora.engine.sampling.uniform import mixed_seed
from multilora.engine.sampling.uniform import uniforms as uniforms_of

GOLDEN = {
    (0, 0): 0.6524484863740322,
    (0, 1): 0.7012121095215252,
    (1, 0): 0.36818951565166946,
    (42, 7): 0.7347204584623639,
    (-1, 0): 0.3662420901697574,
    (2**63 - 1, 1_000_000): 0.39854775898749717,
}


def uniforms(seeds, positions) -> np.ndarray:
    streams = np.array([mixed_seed(seed) for seed in seeds], dtype=np.uint64)
    return uniforms_of(streams, np.array(positions, dtype=np.int32))


def splitmix64(state: int) -> int:
    """The published algorithm on plain integers: one step from `state`."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_golden_numbers_never_change():
    seeds, positions = zip(*GOLDEN, strict=True)
    assert uniforms(seeds, positions).tolist() == list(GOLDEN.values())


def test_is_splitmix64_started_at_the_mixed_seed():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # first output for seed 0, as published
    for seed, position in GOLDEN:
        state = splitmix64(seed % 2**64) + position * 0x9E3779B97F4A7C15
        assert uniforms([seed], [position])[0] == (splitmix64(state % 2**64) >> 11) / 2**53


def test_neighbouring_seeds_and_positions_are_uniform_and_unrelated():
    n = 300
    seeds, positions = np.divmod(np.arange(n * n), n)
    u = uniforms(seeds.tolist(), positions.tolist())
    assert ((u >= 0) & (u < 1)).all()
    counts = np.bincount((u * 100).astype(int), minlength=100)
    assert ((counts - n * n / 100) ** 2 / (n * n / 100)).sum() < 149  # χ², 99 degrees of freedom, p = 0.001
    table = u.reshape(n, n)
    for a, b in ((table[:-1], table[1:]), (table[:, :-1], table[:, 1:]), (table, table.T)):
        a, b = a[~np.eye(*a.shape, dtype=bool)], b[~np.eye(*b.shape, dtype=bool)]
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / n


def test_no_rows():
    assert uniforms([], []).shape == (0,)
