"""Compiles the FP8 product of experts for GPUs that are not here, as `compile_attention.py` does attention's kernels.

Reads lines of arguments, `blocks columns dtype capability`: the name of block sizes in `triton_fp8_grouped.py`, the
columns that share a scale (0: all of a row), and of what comes out the dtype.
"""

import json
import sys
from typing import Any

from compile_ahead import SHARED, compiled

from multilora.layers import triton_fp8_grouped as grouped

EACH = {"FEW": 1, "MANY": grouped.FEW_ROWS + 1}
"""Rows of an expert for which these block sizes are taken."""
POINTERS = {
    "x_ptr": "fp8e4nv",
    "x_scale_ptr": "fp32",
    "weight_ptr": "fp8e4nv",
    "scale_ptr": "fp32",
    "ends_ptr": "i32",
}
SIZES = ("outs", "width")


def shared_bytes(name: str, columns: int, dtype: str, capability: int) -> int:
    """The shared memory of a program of Qwen3-30B-A3B's sizes, and of odd ones, which is what is larger."""
    found, early = [], capability >= 90
    blocks = grouped.blocks_of(8 * EACH[name], 8, columns or None, SHARED[capability])
    for even in (True, False):
        given = {key: f"*{kind}" for key, kind in POINTERS.items()} | {"out_ptr": f"*{dtype}"}
        given |= dict.fromkeys(("outs", "width", "experts", "groups", "high"), "i32")
        constants: dict[str, Any] = {"BM": blocks.rows, "BN": blocks.outs, "BK": blocks.columns, "EXPERTS": 128}
        constants |= {"BLOCKED": columns > 0, "SWAPPED": blocks.swapped, "EVEN": even, "PDL": early}
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
        options |= {"launch_pdl": True} if early else {}
        sizes = SIZES if even else ()
        one = compiled(grouped._grouped_product, given, constants, capability, aligned=sizes, **options)
        found.append(int(one.metadata.shared))
    return max(found)


if __name__ == "__main__":
    for line in sys.stdin:
        name, columns, dtype, capability = line.split()
        nbytes = shared_bytes(name, int(columns), dtype, int(capability))
        print(json.dumps({"case": line.split(), "shared": nbytes, "most": SHARED[int(capability)]}), flush=True)
