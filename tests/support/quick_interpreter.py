"""Triton's interpreter as it is, without three things that took half of its time.

It reads all the members of `triton.language` at every call of a device function, though they are patched already; it
builds a table of dtypes for every value; and it computes, in nine operations for each, whether a sum of integers has
overflowed, but asserts it in Triton's debug mode only. `kernels/test_quick_interpreter.py` holds both to the same.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

REPLACED = ("_patch_lang", "_patch_builtin", "_get_np_dtype")
USED = (*REPLACED, "_LangPatchScope", "interpreter_builder", "interpreter_semantic")
own = {name: getattr(interpreter, name, None) for name in REPLACED}
"""What the interpreter has itself."""


class Patches:
    """Patches of the modules `tl` and `tl.core`: made for a kernel, kept for the device functions that it calls."""

    def __init__(self) -> None:
        self._patched: set[ModuleType] = set()
        self._seen: dict[int, tuple[int, set[ModuleType]]] = {}
        self._builtins: dict[Any, list[tuple[str, Any, Any]]] = {}

    def lang(self, fn: Any) -> Any:
        """`_patch_lang`. The scope of a device function is nobody's: the interpreter drops it."""
        seen, outermost = self._modules(fn.__globals__), not self._patched
        if seen and seen <= self._patched:
            return interpreter._LangPatchScope()
        scope = own["_patch_lang"](fn)
        self._patched |= seen
        if outermost:
            restore = scope.restore

            def forget() -> None:
                self._patched.clear()
                restore()

            scope.restore = forget
        return scope

    def _modules(self, names: dict[str, Any]) -> set[ModuleType]:
        """Which of the two a function of this module sees. The interpreter adds names to a module, once."""
        size, seen = self._seen.get(id(names), (-1, set()))
        if size != len(names):
            seen = {value for value in names.values() if inspect.ismodule(value) and value in (tl, tl.core)}
            self._seen[id(names)] = len(names), seen
        return seen

    def builtin(self, package: Any, _: Any, scope: Any) -> None:
        """`_patch_builtin`, with the members looked up once."""
        if package not in self._builtins:
            members = [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
            self._builtins[package] = [(name, member, interpreted(member)) for name, member in members]
        for name, member, replacement in self._builtins[package]:
            if getattr(package, name) is member:
                scope.set_attr(package, name, replacement)


def interpreted(member: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        options["_semantic"] = interpreter.interpreter_semantic
        return member(*args, **options)

    return call


def dtypes() -> Callable[[Any], Any]:
    """`_get_np_dtype`, which asks the interpreter's own once per type of a single number."""
    of_scalar = functools.cache(own["_get_np_dtype"])
    address = np.dtype(np.uint64)

    def of(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return address if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    return of


def install() -> bool:
    """Whether Triton has the parts that are replaced: a version that lacks one is only slower."""
    if not all(hasattr(interpreter, name) for name in USED):
        return False
    patches = Patches()
    interpreter._patch_lang = patches.lang
    interpreter._patch_builtin = patches.builtin
    interpreter._get_np_dtype = dtypes()
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    return True
