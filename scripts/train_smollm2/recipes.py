"""The adapters' shapes, in two sets: `small` fits into the wheel, `full` has ranks from 8 to 32 and 18 MB in bf16."""

from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def _lora(rank: int, modules: list[str], **fields: Any) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": modules} | fields


RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "pirate": _lora(8, ["q_proj", "v_proj"]),
        "sql": _lora(8, ["q_proj", "v_proj"]),
        "json": _lora(8, ["q_proj", "v_proj"]),
        "french": _lora(8, ["v_proj", "down_proj"]),
    },
    "full": {
        "pirate": _lora(8, ATTENTION),
        "sql": _lora(32, ATTENTION, use_rslora=True, lora_alpha=16),
        "json": _lora(16, ATTENTION),
        "french": _lora(8, [*ATTENTION, *MLP]),
    },
}
