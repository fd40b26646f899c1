import math

from multilora.kernels.integers import cdiv, power_of_two


def test_rounds_up():
    assert all(cdiv(a, b) == math.ceil(a / b) for a in range(40) for b in range(1, 12))


def test_next_power_of_two():
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 16, 17)] == [1, 1, 2, 4, 4, 8, 16, 32]
