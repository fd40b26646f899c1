"""Compiles the 4-bit product of experts for GPUs that are not here, as `compile_experts.py` does the one in FP8.

Reads lines of arguments, `blocks group capability`: the name of block sizes in `triton_int4_grouped.py`, and the
inputs that share a scale. Says, too, whether loads are asynchronous copies, and how many bytes of registers are
spilled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compile_ahead import SHARED, compiled
from triton.backends.nvidia.compiler import get_ptxas

from multilora.layers import triton_int4_grouped as grouped

EACH = {"FEW": 1, "MANY": grouped.FEW_ROWS + 1}
"""Rows of an expert for which these block sizes are taken."""
GIVEN = {"x_ptr": "*bf16", "packed_ptr": "*u8", "scales_ptr": "*i32", "ends_ptr": "*i32", "out_ptr": "*bf16"}
GIVEN |= dict.fromkeys(("outs", "width", "half", "group", "experts"), "i32")


def spilled(ptx: str, capability: int) -> int:
    """Bytes that ptxas has no registers for."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", path]
        done = subprocess.run([*command, "-o", path.with_suffix(".o")], capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))


def about(name: str, group: int, capability: int) -> dict[str, Any]:
    """What a program of Qwen3-30B-A3B's sizes takes."""
    blocks = grouped.blocks_of(8 * EACH[name], 8, group)
    early = capability >= 90
    constants: dict[str, Any] = {"BM": blocks.rows, "BN": blocks.outs, "BK": blocks.columns, "EXPERTS": 128}
    options: dict[str, Any] = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    options |= {"launch_pdl": True} if early else {}
    sizes = ("outs", "width", "half", "group", "experts")
    one = compiled(grouped._grouped_product, GIVEN, constants | {"PDL": early}, capability, aligned=sizes, **options)
    ptx = one.asm["ptx"]
    return {
        "shared": int(one.metadata.shared),
        "most": SHARED[capability],
        "copies": "cp.async" in ptx,
        "spilled": spilled(ptx, capability),
    }


if __name__ == "__main__":
    for line in sys.stdin:
        name, group, capability = line.split()
        print(json.dumps({"case": line.split()} | about(name, int(group), int(capability))), flush=True)
