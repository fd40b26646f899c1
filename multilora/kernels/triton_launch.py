"""How this package launches its Triton kernels: early, and without binding their arguments anew each time.

With programmatic dependent launch, a kernel starts while the one before it still runs, and waits inside; that saves
the launch latency, about a microsecond each. The rule is that every program waits before it touches what an earlier
kernel may still read or write, so that a finished kernel means that all before it have finished.

Triton binds, specializes and hashes the arguments of every launch, which takes 30 to 60 µs for twenty of them.
`launch` asks it only once per kind of arguments and keeps what it compiled. `Repeated` is for launches that come
again in every layer with nearly the same arguments: 2 µs instead of 10. Called by `lora/`, `attention/` and
`layers/`.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_compiled: dict[tuple[Any, ...], Any] = {}


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for the kernels before this one, then let the next one start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def can_launch_early(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch: NVIDIA GPUs from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


UNLIMITED = 1 << 30


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program can have on the device; where Triton interprets, as many as it likes."""
    if device.type != "cuda":
        return UNLIMITED
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    *,
    early: bool = False,
    **options: int,
) -> Any | None:
    """kernel[grid](*args, **constants, **options), on the current stream. Returns the compiled kernel; None where
    Triton interprets.

    args: a tensor, then tensors, None, ints and floats, in the order of the kernel's parameters before its first
    constant; constants: the other parameters, in order; early: launch as a programmatic dependent. A compiled kernel
    is kept per kind of arguments: a tensor's kind is its dtype and whether it is aligned to 16 bytes, an int's is
    what Triton may specialize on.
    """
    bound: list[Any] = []
    kinds: list[Any] = [id(kernel), args[0].get_device(), early]  # kernels live as long as their modules
    for arg in args:
        if isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            bound.append(address)
            kinds += arg.dtype, address % 16 == 0
        else:
            bound.append(arg)
            kinds += (arg == 1, arg % 16 == 0, arg.bit_length() > 31) if isinstance(arg, int) else (type(arg),)
    key = (*kinds, *constants.values(), *options.values())
    found = _compiled.get(key)
    if found is not None:
        found[(*grid, 1, 1)[:3]](*bound, *constants.values())
        return found
    if early:
        options["launch_pdl"] = True
    compiled = kernel[grid](*args, **constants, **options)
    if compiled is not None:  # None: interpreted
        _compiled[key] = compiled
    return compiled


class Repeated:
    """Launches of one kernel that differ in their first arguments only: some tensors, whose types stay, then ints
    that Triton does not specialize on. The other arguments are bound once.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        rest: tuple[Any, ...],
        constants: dict[str, Any],
        *,
        early: bool = False,
        **options: int,
    ):
        """As `launch`. rest: the arguments after those that change; its tensors must stay where they are."""
        self._kernel, self._grid, self._rest, self._constants = kernel, grid, rest, constants
        self._early, self._options = early, options
        self._run: Any | None = None
        addresses = (arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in rest)
        self._bound = (*addresses, *constants.values())

    def __call__(self, tensors: tuple[torch.Tensor, ...], *ints: int) -> None:
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = not any(address % 16 for address in addresses)
        if aligned and self._run is not None:
            self._run(*addresses, *ints, *self._bound)
            return
        args = (*tensors, *ints, *self._rest)
        compiled = launch(self._kernel, self._grid, args, self._constants, early=self._early, **self._options)
        if aligned and compiled is not None:
            self._run = compiled[(*self._grid, 1, 1)[:3]]
