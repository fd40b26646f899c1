"""Adapters whose tensors are wrong: the type of each error, and that it names file, tensor or module."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multilora.adapters import checkpoint
from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.base_model import BaseModel
from multilora.adapters.checkpoint import read_adapter
from multilora.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice

Tensors = dict[str, torch.Tensor]
SITES = (
    LoraSite(0, 0, "qkv_proj", 8, (LoraSlice("q_proj", 0, 8), LoraSlice("v_proj", 8, 6))),
    LoraSite(1, 0, "down_proj", 10, (LoraSlice("down_proj", 0, 8),)),
    LoraSite(2, 1, "qkv_proj", 8, (LoraSlice("q_proj", 0, 8), LoraSlice("v_proj", 8, 6))),
    LoraSite(3, 1, "down_proj", 10, (LoraSlice("down_proj", 0, 8),)),
    LoraSite(4, MODEL_LEVEL, "embed_tokens", 9, (LoraSlice("embed_tokens", 0, 8),)),
    LoraSite(5, MODEL_LEVEL, "lm_head", 8, (LoraSlice("lm_head", 0, 9),)),
)
BASE = BaseModel(
    SITES,
    vocab_size=9,
    hidden_size=8,
    tie_word_embeddings=False,
    norms={"input_layernorm": 8, "norm": 8},
    biased=("v_proj",),
)
TIED = replace(BASE, tie_word_embeddings=True)
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": r".*(q_proj|v_proj|down_proj|o_proj|lm_head|embed_tokens)",
}
LAYER = "base_model.model.model.layers"
Q0 = f"{LAYER}.0.self_attn.q_proj"
V0 = f"{LAYER}.0.self_attn.v_proj"


def pair(module: str, width_in: int, width_out: int, rank: int = 2) -> Tensors:
    return {
        f"{module}.lora_A.weight": torch.ones(rank, width_in),
        f"{module}.lora_B.weight": torch.ones(width_out, rank),
    }


def add(extra: Tensors) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | extra


def drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


WHOLE = torch.ones(8, 8)
CASES: dict[str, tuple[Callable[[Tensors], Tensors], type[AdapterError], str]] = {
    "no tensors": (lambda _: {}, AdapterInvalid, "holds no tensors"),
    "A without B": (drop(f"{Q0}.lora_B.weight"), AdapterInvalid, f"{Q0}.lora_A.weight': lora_A without its lora_B"),
    "B without A": (drop(f"{Q0}.lora_A.weight"), AdapterInvalid, f"{Q0}.lora_B.weight': lora_B without its lora_A"),
    "given twice": (add(pair("model.layers.0.self_attn.q_proj", 8, 8)), AdapterInvalid, "given twice"),
    "two adapters": (
        add({f"{V0}.lora_A.default.weight": torch.ones(2, 8)}),
        AdapterInvalid,
        "more than one adapter",
    ),
    "left over": (add({f"{Q0}.scale": WHOLE}), AdapterInvalid, f"{Q0}.scale': left over"),
    "left over, like A": (add({f"{Q0}.lora_AB.weight": WHOLE}), AdapterIncompatible, "no module"),
    "rank of the config": (add(pair(V0, 8, 6, 3)), AdapterInvalid, f"{V0}.lora_A.weight': rank 3"),
    "rank 0": (add(pair(V0, 8, 6, 0)), AdapterInvalid, f"{V0}.lora_A.weight': rank 0"),
    "ranks disagree": (add({f"{Q0}.lora_A.weight": torch.ones(3, 8)}), AdapterInvalid, "[3, 8] and [8, 2]"),
    "A of three dims": (add({f"{Q0}.lora_A.weight": torch.ones(2, 8, 1)}), AdapterInvalid, "[2, 8, 1]"),
    "A too wide": (
        add(pair(V0, 9, 6)),
        AdapterIncompatible,
        "'model.layers.0.self_attn.v_proj' does not fit the base model: expected lora_A [2, 8] and lora_B [6, 2], "
        "found [2, 9] and [6, 2]",
    ),
    "B too wide": (add(pair(V0, 8, 60)), AdapterIncompatible, "found [2, 8] and [60, 2]"),
    "layer out of range": (
        add(pair(f"{LAYER}.2.self_attn.q_proj", 8, 8)),
        AdapterIncompatible,
        "layer 2 is out of range, the base model has 2 layers",
    ),
    "layer far out of range": (
        add(pair(f"{LAYER}.{'9' * 30}.self_attn.q_proj", 8, 8)),
        AdapterIncompatible,
        "the base model has no module",
    ),
    "no such module": (add(pair(f"{LAYER}.0.self_attn.o_proj", 8, 8)), AdapterIncompatible, "self_attn.o_proj"),
    "wrong parent": (add(pair(f"{LAYER}.0.cross_attn.q_proj", 8, 8)), AdapterIncompatible, "cross_attn.q_proj"),
    "another tower": (
        add(pair("base_model.model.vision.model.layers.0.self_attn.q_proj", 8, 8)),
        AdapterIncompatible,
        "vision.model.layers.0",
    ),
    "not targeted": (add(pair(f"{LAYER}.1.mlp.down_proj", 10, 8)), AdapterInvalid, "does not target module"),
}


def write(folder: Path, tensors: Tensors, **config: Any) -> Path:
    (folder / "adapter_config.json").write_text(
        json.dumps(CONFIG | {"exclude_modules": ["1.mlp.down_proj"]} | config)
    )
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_wrong_tensors(case: str, tmp_path: Path) -> None:
    change, error, said = CASES[case]
    write(tmp_path, pair(Q0, 8, 8))
    assert len(read_adapter(tmp_path, BASE, AdapterLimits()).blocks) == 1
    write(tmp_path, change(pair(Q0, 8, 8)))
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path, BASE, AdapterLimits())
    assert type(caught.value) is error
    assert said in caught.value.message


def test_layers_that_the_config_leaves_out(tmp_path: Path) -> None:
    write(tmp_path, pair(Q0, 8, 8), target_modules=["q_proj"], layers_to_transform=[1])
    with pytest.raises(AdapterInvalid, match=r"does not target module 'model.layers.0.self_attn.q_proj'"):
        read_adapter(tmp_path, BASE, AdapterLimits())


def test_files_that_change_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, pair(Q0, 8, 8))
    marks = iter(["before", "after"])
    monkeypatch.setattr(checkpoint, "fingerprint", lambda _: next(marks))
    with pytest.raises(AdapterInvalid, match="changed while they were read"):
        read_adapter(tmp_path, BASE, AdapterLimits())
