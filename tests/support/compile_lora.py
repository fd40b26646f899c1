"""Compiles the LoRA kernels with committed block sizes for GPUs that are not here.

A process of its own, as the tests have Triton interpret. Prints one JSON object per line of arguments on stdin,
`tuning phase kernel dtype capability`: the bytes of shared memory of a program.
"""

import json
import sys
from typing import Any

from compile_ahead import SHARED, compiled

from multilora.kernels.integers import cdiv, power_of_two
from multilora.lora import tuning
from multilora.lora.triton_gated import gated_kernel
from multilora.lora.triton_kernels import expand_kernel, shrink_kernel
from multilora.lora.triton_steps import MIN_TILE

TABLES = {"h": "*fp32", "addresses": "*i64", "records": "*i32", "tiles": "*i32", "entries": "*i32"}
ALIGNED = ("width", "cut", "h_split", "y_stride")
SITES = ((4096, 6144), (4096, 28672), (14336, 4096))


def compile_one(name: str, phase_name: str, kernel: str, dtype: str, capability: int, site: tuple[int, int]) -> Any:
    """The kernel as `TritonLora` launches it for a site of so many inputs and outputs."""
    sizes: tuning.Tuning = getattr(tuning, name)
    phase: tuning.Phase = getattr(sizes, phase_name)
    large = phase_name == "large"
    early = phase_name == "small" and capability >= 90
    shrink, expand = phase.shrink(site[0]), phase.expand(site[1])
    splits, rows = cdiv(site[0], shrink.k), 32 if large else MIN_TILE
    given = {**TABLES, "weights": f"*{dtype}", **dict.fromkeys(("site", "sites", "h_split"), "i32")}
    constants: dict[str, Any] = {"RECORD": 10, "UNCUT": True, "ALIGN": 8, "TILE_M": rows}
    vector = not large and name == "CSGMV"
    if kernel == "shrink":
        given |= {"x": f"*{dtype}", "width": "i32", "cut": "i32"}
        constants |= {"VECTOR": vector, "BLOCK_K": shrink.k, "TILE_K": min(shrink.tile_k, shrink.k)}
        constants |= {"TILE_R": shrink.tile_r, "PARTS": shrink.parts if vector and not early else 1, "PDL": early}
        return _compiled(shrink_kernel, given, constants, capability, early, shrink)
    given |= {"y": f"*{dtype}", "splits": "i32"}
    if kernel == "expand":
        given |= {"blocks": "*i32", "y_stride": "i32"}
        constants |= {"ALIGN_N": 16, "VECTOR": vector, "BLOCK_N": expand.n, "BLOCK_S": power_of_two(splits)}
        constants |= {"TILE_N": min(expand.tile_n, expand.n), "TILE_R": expand.tile_r, "PDL": early}
        return _compiled(expand_kernel, given, constants, capability, early, expand)
    assert phase.gated is not None
    given |= {"out": f"*{dtype}", "width": "i32", "cut": "i32"}
    constants |= {"BLOCK_N": phase.gated.n, "TILE_N": phase.gated.tile_n, "TILE_R": phase.gated.tile_r, "FAST": True}
    return _compiled(gated_kernel, given, constants, capability, False, phase.gated)


def _compiled(
    kernel: Any, given: dict[str, str], constants: dict[str, Any], capability: int, early: bool, blocks: Any
) -> Any:
    options = tuning.options_of(blocks) | ({"launch_pdl": True} if early else {})
    return compiled(kernel, given, constants, capability, aligned=ALIGNED, **options)


if __name__ == "__main__":
    for line in sys.stdin:
        name, phase, kernel, dtype, capability = line.split()
        nbytes = max(
            int(compile_one(name, phase, kernel, dtype, int(capability), site).metadata.shared) for site in SITES
        )
        print(json.dumps({"case": line.split(), "shared": nbytes, "most": SHARED[int(capability)]}), flush=True)
