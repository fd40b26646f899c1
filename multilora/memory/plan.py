"""How large the arena is, and a plan a person can read. Called once at start by `engine/engine.py`."""

from dataclasses import dataclass

from multilora.errors import OutOfMemory
from multilora.memory.kv_layout import KVLayout

CPU_ARENA_BYTES = 1 << 30
"""The most the arena takes by itself on CPU."""


@dataclass(frozen=True)
class MemoryPlan:
    """`num_pages` pages of `page_bytes`; `reason` says which rule decided."""

    num_pages: int
    page_bytes: int
    page_size: int
    weight_bytes: int
    reason: str

    @property
    def arena_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def __str__(self) -> str:
        return (
            f"weights {format_bytes(self.weight_bytes)}, arena {format_bytes(self.arena_bytes)}: "
            f"{self.num_pages} pages of {self.page_size} tokens ({format_bytes(self.page_bytes)}), "
            f"{self.num_pages * self.page_size} tokens of KV if no adapter is resident; sized by {self.reason}"
        )


def plan_memory(
    layout: KVLayout,
    *,
    weight_bytes: int,
    context_length: int,
    max_running_requests: int,
    arena_bytes: int | None,
    max_total_tokens: int | None,
    available_bytes: int | None,
    mem_fraction_static: float,
) -> MemoryPlan:
    """Choose the number of pages.

    available_bytes: free device memory after the weights and a profiled peak (CUDA); None on CPU, where the arena
    holds what `max_running_requests` full contexts need, doubled so that adapters find room, at most 1 GiB.
    Raises OutOfMemory when not one full page of context fits what was asked for.
    """
    page = layout.page_bytes
    if arena_bytes is not None:
        pages, reason = arena_bytes // page, "--arena-bytes"
    elif max_total_tokens is not None:
        pages, reason = layout.pages_for(max_total_tokens), "--max-total-tokens"
    elif available_bytes is not None:
        pages = int(available_bytes * mem_fraction_static) // page
        reason = f"--mem-fraction-static {mem_fraction_static} of {format_bytes(available_bytes)}"
    else:
        wanted = 2 * max_running_requests * layout.pages_for(context_length)
        pages, reason = min(wanted, CPU_ARENA_BYTES // page), "--max-running-requests x context, at most 1 GiB"
    if pages < 2:
        raise OutOfMemory(
            f"the arena would hold {pages} pages of {format_bytes(page)} (sized by {reason}; weights took "
            f"{format_bytes(weight_bytes)}): raise --arena-bytes or lower --page-size (now {layout.page_size})"
        )
    if available_bytes is not None and pages * page > available_bytes:
        raise OutOfMemory(
            f"the arena asks for {format_bytes(pages * page)} ({reason}) but only {format_bytes(available_bytes)} "
            f"are free beside the weights ({format_bytes(weight_bytes)}): lower --arena-bytes or --max-total-tokens"
        )
    return MemoryPlan(pages, page, layout.page_size, weight_bytes, reason)


def format_bytes(n: int) -> str:
    """1536 → '1.5 KiB'."""
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
