"""Compiles one Triton kernel for a GPU that is not here: the whole compiler, ptxas included."""

from collections.abc import Collection
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes that one program can have, by compute capability."""


def compiled(
    kernel: Any,
    given: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    *,
    aligned: Collection[str] = (),
    **options: Any,
) -> Any:
    """given: Triton's type of each argument that is no constant; aligned: integers that are multiples of 16, as all
    addresses are."""
    signature = {name: given.get(name, "constexpr") for name in kernel.arg_names}
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    multiples = [name for name, kind in given.items() if kind.startswith("*") or name in aligned]
    source = ASTSource(
        kernel,
        signature,
        {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in multiples},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
