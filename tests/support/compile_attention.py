"""Compiles the kernels of paged attention for GPUs that are not here: Triton's whole compiler, ptxas included.

A process of its own, as the tests have Triton interpret. Prints one JSON object per line of arguments on stdin,
`kernel dtype pages head_dim capability`: the bytes of shared memory of a program.
"""

import json
import sys
from typing import Any

import torch
from compile_ahead import SHARED, compiled

from multilora.attention import triton_cascade, triton_decode, triton_kernels, triton_prefill
from multilora.attention.triton_scores import block_tokens
from multilora.kernels.integers import power_of_two

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STRIDES = ("page_stride", "slot_stride", "head_stride")


def shared_bytes(kernel: str, dtype: str, pages: str, dim: int, capability: int) -> int:
    """Of a program of a kernel with every feature on."""
    if kernel in ("rotate", "merge"):
        return _small(kernel, dtype, pages, dim, capability)
    width, memory, early = max(16, power_of_two(dim)), SHARED[capability], capability >= 90
    given = {"q_ptr": f"*{dtype}", "k_pages": f"*{pages}", "v_pages": f"*{pages}", "indices": "*i32"}
    given |= {"sinks_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **dict.fromkeys((*STRIDES, "group"), "i32")}
    given |= dict.fromkeys(("scale", "v_scale", "softcap"), "fp32")
    constants: dict[str, Any] = {"PAGE": 16, "DIM": dim, "WIDTH": width, "CAP": True, "SINKS": True, "PDL": early}
    constants["BLOCK"] = block_tokens(DTYPES[dtype], width, memory)
    launch = {"launch_pdl": True} if early else {}
    if kernel == "decode":
        given |= {"pieces": "*i32", "partial_ptr": "*fp32", "lse_ptr": "*fp32"}
        constants["GROUP"] = 16
        launch |= {"num_warps": triton_decode.WARPS, "num_stages": triton_decode.STAGES}
        found = compiled(triton_decode._attend, given, constants, capability, aligned=STRIDES, **launch)
    elif kernel.startswith("cascade"):
        group = int(kernel.removeprefix("cascade"))
        given = {key: kind for key, kind in given.items() if key not in ("sinks_ptr", "out_ptr")}
        given |= {"pieces": "*i32", "partial_ptr": "*fp32", "lse_ptr": "*fp32"}
        constants.pop("SINKS")
        constants |= {"GROUP": power_of_two(group), "MEMBERS": triton_cascade.most_members(group)}
        launch |= {"num_warps": triton_cascade.warps_of(width), "num_stages": triton_decode.STAGES}
        found = compiled(triton_cascade._attend_shared, given, constants, capability, aligned=STRIDES, **launch)
    else:
        given |= {"blocks": "*i32", "window": "i32"}
        constants |= {"ROWS": triton_prefill.rows_of(DTYPES[dtype]), "WINDOW": True}
        launch |= {"num_warps": triton_prefill.warps_of(width), "num_stages": triton_prefill.STAGES}
        found = compiled(triton_prefill._attend, given, constants, capability, aligned=STRIDES, **launch)
    return int(found.metadata.shared)


def _small(kernel: str, dtype: str, pages: str, dim: int, capability: int) -> int:
    """Of the kernels around those."""
    early = capability >= 90
    launch = {"launch_pdl": True} if early else {}
    if kernel == "merge":
        given = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "spans": "*i32"}
        given |= {"sinks_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
        width = max(16, power_of_two(dim))
        constants: dict[str, Any] = {"DIM": dim, "WIDTH": width, "SLOTS": triton_decode.MERGE_ELEMENTS // width}
        constants |= {"SINKS": True, "PDL": early}
        return int(
            compiled(
                triton_decode._merge, given, constants, capability, aligned=STRIDES, num_warps=4, **launch
            ).metadata.shared
        )
    strides = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", *STRIDES, "group")
    given = dict.fromkeys(strides, "i32") | dict.fromkeys(("k_scale", "v_scale"), "fp32")
    given |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    given |= {"k_pages": f"*{pages}", "v_pages": f"*{pages}", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    given |= dict.fromkeys(("out_row_ptr", "token_page", "token_slot"), "*i64")
    constants = {"HALF": dim // 2, "WIDTH": power_of_two(dim // 2), "GROUP": 4, "MOVE_ROWS": True, "PDL": early}
    constants["MOST"] = 448.0 if pages.startswith("fp8") else 0.0
    return int(
        compiled(
            triton_kernels._rotate_and_write, given, constants, capability, aligned=STRIDES, num_warps=1, **launch
        ).metadata.shared
    )


if __name__ == "__main__":
    for line in sys.stdin:
        kernel, dtype, pages, dim, capability = line.split()
        nbytes = shared_bytes(kernel, dtype, pages, int(dim), int(capability))
        print(json.dumps({"case": line.split(), "shared": nbytes, "most": SHARED[int(capability)]}), flush=True)
