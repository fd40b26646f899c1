"""Compiles small kernels for GPUs that are not here; a process of its own, as the tests have Triton interpret.

Takes names of `CASES` as arguments, each compiled for compute capabilities 8.0, with what starts early left out, and
9.0. Prints one line for each.
"""

import sys
from collections.abc import Callable
from typing import Any

from compile_ahead import compiled

from multilora.adapters.device import triton_pack
from multilora.distributed import triton_exchange, triton_gather
from multilora.engine.sampling import triton_argmax
from multilora.layers import triton_ops

Case = tuple[Any, dict[str, str], dict[str, Any], tuple[str, ...]]
"""A kernel, the types of its arguments, its constants, and arguments that are multiples of 16."""


def gather() -> Case:
    pointers = {"x_ptr": "*fp32", "out_ptr": "*fp32", "buffers_ptr": "*i64", "counts_ptr": "*i32", "stop_ptr": "*i32"}
    numbers = ("rows", "part", "columns", "capacity")
    constants = {"BLOCK": triton_gather.BLOCK, "RANK": 0, "SIZE": 2, "SLOTS": triton_exchange.SLOTS}
    return triton_gather._gather_columns, pointers | dict.fromkeys(numbers, "i32"), constants, numbers


def search() -> Case:
    given = {"logits_ptr": "*fp32", "values_ptr": "*fp32", "places_ptr": "*i32"}
    given |= dict.fromkeys(("vocab", "row_stride", "parts"), "i32")
    return triton_argmax._search, given, {"BLOCK": triton_argmax.COLUMNS}, ("vocab", "row_stride")


def join() -> Case:
    given = {"values_ptr": "*fp32", "places_ptr": "*i32", "best_ptr": "*fp32", "finite_ptr": "*u8"}
    return triton_argmax._join, given | {"tokens_ptr": "*i64", "parts": "i32"}, {"PARTS": 32}, ("parts",)


def embed_part() -> Case:
    given = {"ids_ptr": "*i64", "weight_ptr": "*bf16", "out_ptr": "*bf16"}
    given |= dict.fromkeys(("first", "held", "size"), "i32")
    return triton_ops._embed_part, given, {"BLOCK": 4096}, ("first", "held", "size")


def pack() -> Case:
    given = {"raw": "*fp16", "arena": "*bf16", "table": "*i64", "pages": "*i64", "page_elements": "i32"}
    return triton_pack._pack, given, {"ROWS": triton_pack.ROWS, "COLUMNS": triton_pack.COLUMNS}, ("page_elements",)


CASES: dict[str, Callable[[], Case]] = {
    "gather": gather, "search": search, "join": join, "embed_part": embed_part, "pack": pack,
}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:]:
        kernel, given, constants, aligned = CASES[name]()
        for capability in (80, 90):
            early = capability >= 90
            starts_early = {"PDL": early} if "PDL" in kernel.arg_names else {}
            options = {"launch_pdl": True} if any(starts_early.values()) else {}
            found = compiled(kernel, given, constants | starts_early, capability, aligned=aligned, **options)
            print(name, capability, found.metadata.shared, flush=True)
