"""How large the arena is, and a plan that a person can read. Called by `engine/build_rank.py`, once, at start."""

from dataclasses import dataclass

from multilora.errors import OutOfMemory
from multilora.memory.kv_layout import KVLayout

CPU_ARENA_BYTES = 1 << 30
"""The most bytes that the arena takes on CPU unless it is given a size."""


@dataclass(frozen=True)
class MemoryPlan:
    """An arena of `num_pages` pages of `page_bytes`; `reason`: the rule that decided; `beside`: what else takes
    memory; columns: pages of `page_size` tokens that all layers keep."""

    num_pages: int
    page_bytes: int
    page_size: int
    weight_bytes: int
    reason: str
    beside: str = ""
    columns: int = 1

    @property
    def arena_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV it holds if no adapter is resident, and all layers keep all of them."""
        return self.num_pages // self.columns * self.page_size

    def __str__(self) -> str:
        each = f" in {self.columns} sets of layers" if self.columns > 1 else ""
        return (
            f"weights {format_bytes(self.weight_bytes)}{self.beside}, arena {format_bytes(self.arena_bytes)}: "
            f"{self.num_pages} pages of {self.page_size} tokens{each} ({format_bytes(self.page_bytes)}), "
            f"{self.kv_tokens} tokens of KV if no adapter is resident; sized by {self.reason}"
        )


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a GPU that holds the weights already: how many are free, and how many of those steps and CUDA graphs
    will take. table_bytes: what adapter tables and page lists take for each page of the arena.
    """

    free: int
    step_bytes: int
    graph_bytes: int
    table_bytes: int = 0

    @property
    def available(self) -> int:
        """The most bytes that the arena and its tables can have."""
        return max(0, self.free - self.step_bytes - self.graph_bytes)

    def __str__(self) -> str:
        return f", a step {format_bytes(self.step_bytes)}, CUDA graphs {format_bytes(self.graph_bytes)}"


def plan_memory(
    layout: KVLayout,
    *,
    weight_bytes: int,
    context_length: int,
    max_running_requests: int,
    arena_bytes: int | None,
    max_total_tokens: int | None,
    device: DeviceMemory | None,
    mem_fraction_static: float,
) -> MemoryPlan:
    """Choose the number of pages.

    device: None on CPU, where the arena holds what `max_running_requests` full contexts need, doubled to leave room
    for adapters, and at most 1 GiB. Raises OutOfMemory if what was asked for does not fit, or is under two pages.
    """
    page = layout.page_bytes
    if arena_bytes is not None:
        pages, reason = arena_bytes // page, "--arena-bytes"
    elif max_total_tokens is not None:
        pages, reason = layout.pages_for(max_total_tokens), "--max-total-tokens"
    elif device is not None:
        pages = int(device.available * mem_fraction_static) // (page + device.table_bytes)
        reason = f"--mem-fraction-static {mem_fraction_static} of {format_bytes(device.available)}"
    else:
        wanted = 2 * max_running_requests * layout.pages_for(context_length)
        pages, reason = min(wanted, CPU_ARENA_BYTES // page), "--max-running-requests x context, at most 1 GiB"
    need = max(2, pages) * (page + (device.table_bytes if device else 0))
    if device is not None and need > device.available:
        raise OutOfMemory(
            f"the arena asks for {format_bytes(need)} ({reason}); beside the weights "
            f"({format_bytes(weight_bytes)}) {format_bytes(device.free)} are free, of which a step takes "
            f"{format_bytes(device.step_bytes)} and CUDA graphs {format_bytes(device.graph_bytes)}: lower "
            "--arena-bytes or --max-total-tokens if given, --chunked-prefill-size or --cuda-graph-max-bs, or start "
            "with --disable-cuda-graph"
        )
    if pages < 2:
        raise OutOfMemory(
            f"the arena would hold {pages} pages of {format_bytes(page)} (sized by {reason}; weights took "
            f"{format_bytes(weight_bytes)}): raise --arena-bytes or lower --page-size (now {layout.page_size})"
        )
    return MemoryPlan(
        pages, page, layout.page_size, weight_bytes, reason, str(device) if device else "", layout.columns
    )


def format_bytes(n: int) -> str:
    """1536 → '1.5 KiB'."""
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
