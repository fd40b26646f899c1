"""Adapters whose tensors are wrong: the type of each error, and that it names file, tensor or module."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.peft import checkpoint
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.checkpoint import read_adapter
from multilora.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice, NormModule

Tensors = dict[str, torch.Tensor]
QV = (LoraSlice("q_proj", 0, 8, "self_attn"), LoraSlice("v_proj", 8, 6, "self_attn", bias=True))
DOWN = (LoraSlice("down_proj", 0, 8, "mlp"),)
SITES = (
    LoraSite(0, 0, "qkv_proj", 8, QV),
    LoraSite(1, 0, "down_proj", 10, DOWN),
    LoraSite(2, 1, "qkv_proj", 8, QV),
    LoraSite(3, 1, "down_proj", 10, DOWN),
    LoraSite(4, MODEL_LEVEL, "embed_tokens", 9, (LoraSlice("embed_tokens", 0, 8, "model"),)),
    LoraSite(5, MODEL_LEVEL, "lm_head", 8, (LoraSlice("lm_head", 0, 9),)),
)
NORMS = (
    NormModule(0, "input_layernorm", "", 8, True),
    NormModule(1, "input_layernorm", "", 8, True),
    NormModule(MODEL_LEVEL, "norm", "model", 8, False),
)
BASE = BaseModel(SITES, NORMS, vocab_size=9, hidden_size=8, tie_word_embeddings=False)
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


def tables(rows: int) -> Tensors:
    return {f"{name}.weight": torch.ones(rows, 8, dtype=torch.float16) for name in ("model.embed_tokens", "lm_head")}


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
    "tables without end": (
        lambda tensors: tensors | tables(9 + (1 << 17) + 1),
        AdapterIncompatible,
        "embed_tokens has 131082 rows in the adapter, 9 in the base model: at most 131072 may be added",
    ),
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
    "norm of a layer out of range": (
        add({f"{LAYER}.7.input_layernorm.weight": torch.ones(8)}),
        AdapterIncompatible,
        "layer 7 is out of range, the base model has 2 layers",
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


EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
NORM0 = f"{LAYER}.0.input_layernorm"
DOWN0 = f"{LAYER}.0.mlp.down_proj"
Q, V = pair(Q0, 8, 8), pair(V0, 8, 6)
V_BIAS = {f"{V0}.base_layer.bias": torch.ones(6)}
ON_EMBED = {f"{EMBED}.lora_embedding_A": torch.ones(2, 9), f"{EMBED}.lora_embedding_B": torch.ones(8, 2)}
ON_HEAD = pair(HEAD, 8, 9)
DELTA = {f"{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(2, 8)}
TOKENS = {"trainable_token_indices": [3, 1]}
MAGNITUDE = {f"{Q0}.lora_magnitude_vector": torch.ones(8)}
TABLE = torch.ones(9, 8)

# what is wrong → (config, tensors, base model, error, what it says)
FEATURES: dict[str, tuple[dict[str, Any], Tensors, BaseModel, type[AdapterError], str]] = {
    "magnitude without DoRA": ({}, Q | MAGNITUDE, BASE, AdapterInvalid, "left over: use_dora is not set"),
    "DoRA without magnitude": (
        {"use_dora": True},
        Q,
        BASE,
        AdapterInvalid,
        "has no lora_magnitude_vector, but use_dora",
    ),
    "magnitude of another size": (
        {"use_dora": True},
        Q | {f"{Q0}.lora_magnitude_vector": torch.ones(1, 8)},
        BASE,
        AdapterIncompatible,
        "of 'model.layers.0.self_attn.q_proj' does not fit the base model: expected [8], found [1, 8]",
    ),
    "magnitude alone": ({"use_dora": True}, MAGNITUDE, BASE, AdapterInvalid, "left over: 'model.layers.0"),
    "DoRA on embeddings": ({"use_dora": True}, ON_EMBED, BASE, AdapterUnsupported, "DoRA on the token embedding"),
    "DoRA on a replaced head": (
        {"use_dora": True},
        ON_HEAD | {f"{HEAD}.lora_magnitude_vector": torch.ones(9), f"{HEAD}.base_layer.weight": TABLE},
        BASE,
        AdapterUnsupported,
        "DoRA on 'lm_head', whose weight the adapter replaces",
    ),
    "bias of lora_B without lora_bias": (
        {},
        Q | {f"{Q0}.lora_B.bias": torch.ones(8)},
        BASE,
        AdapterInvalid,
        "left over: lora_bias is not set",
    ),
    "lora_bias without bias": (
        {"lora_bias": True},
        Q,
        BASE,
        AdapterInvalid,
        "has no lora_B.bias, but lora_bias",
    ),
    "lora_bias on embeddings": (
        {"lora_bias": True},
        ON_EMBED,
        BASE,
        AdapterInvalid,
        "lora_bias: PEFT does not have it",
    ),
    "bias that the config does not train": ({}, V | V_BIAS, BASE, AdapterInvalid, "left over: bias in"),
    "bias under its old name": (
        {"bias": "lora_only"},
        V | {f"{V0}.bias": torch.ones(6)},
        BASE,
        AdapterUnsupported,
        "under a name that PEFT does not load",
    ),
    "bias of another module": (
        {"bias": "lora_only"},
        Q | {f"{V0}.bias": torch.ones(6)},
        BASE,
        AdapterInvalid,
        "left over: modules_to_save or bias",
    ),
    "bias where there is none": (
        {"bias": "lora_only"},
        Q | {f"{Q0}.base_layer.bias": torch.ones(8)},
        BASE,
        AdapterIncompatible,
        "'model.layers.0.self_attn.q_proj' has no bias",
    ),
    "bias of another size": (
        {"bias": "lora_only"},
        V | {f"{V0}.base_layer.bias": torch.ones(8)},
        BASE,
        AdapterIncompatible,
        "expected [6], found [8]",
    ),
    "bias of a norm": (
        {"bias": "all"},
        Q | {f"{NORM0}.bias": torch.ones(8)},
        BASE,
        AdapterIncompatible,
        "input_layernorm' has no bias",
    ),
    "weight that is not saved": (
        {},
        Q | {f"{NORM0}.weight": torch.ones(8)},
        BASE,
        AdapterInvalid,
        "left over: modules_to",
    ),
    "base weight of a linear layer": (
        {},
        Q | {f"{Q0}.base_layer.weight": WHOLE},
        BASE,
        AdapterUnsupported,
        "weights of the base model (base_layer.weight",
    ),
    "saved norm missing": (
        {"modules_to_save": ["norm"]},
        Q | {f"{NORM0}.weight": torch.ones(8)},
        BASE,
        AdapterInvalid,
        "modules_to_save means 'model.layers.1.input_layernorm', whose weight is missing",
    ),
    "saved bias missing": (
        {"modules_to_save": ["0.self_attn.v_proj"]},
        Q | {f"{V0}.weight": torch.ones(6, 8)},
        BASE,
        AdapterInvalid,
        "modules_to_save means 'model.layers.0.self_attn.v_proj', whose bias is missing",
    ),
    "saved weight of another shape": (
        {"modules_to_save": ["0.mlp.down_proj"]},
        Q | {f"{DOWN0}.weight": torch.ones(10, 8)},
        BASE,
        AdapterIncompatible,
        "expected [8, 10], found [10, 8]",
    ),
    "saved and LoRA": (
        {"modules_to_save": ["_proj"]},
        Q,
        BASE,
        AdapterInvalid,
        "has LoRA and is in modules_to_save",
    ),
    "LoRA inside a saved module": (
        {"modules_to_save": ["self_attn"]},
        Q,
        BASE,
        AdapterInvalid,
        "does not target module",
    ),
    "LoRA on a norm": (
        {"target_modules": ["input_layernorm"]},
        pair(NORM0, 8, 8),
        BASE,
        AdapterInvalid,
        "no linear layer",
    ),
    "lora_A on embeddings": (
        {},
        pair(EMBED, 9, 8),
        BASE,
        AdapterInvalid,
        "left over: 'model.embed_tokens' has lora_embedding_A",
    ),
    "lora_embedding_A on a linear layer": (
        {},
        Q | {f"{Q0}.lora_embedding_A": torch.ones(2, 8)},
        BASE,
        AdapterInvalid,
        "left over: 'model.layers.0.self_attn.q_proj' has lora_A",
    ),
    "embeddings of another vocabulary": (
        {},
        ON_EMBED | {f"{EMBED}.lora_embedding_A": torch.ones(2, 12)},
        BASE,
        AdapterIncompatible,
        "embed_tokens has 12 rows in the adapter, 9 in the base model",
    ),
    "head of another vocabulary": (
        {},
        pair(HEAD, 8, 12),
        BASE,
        AdapterIncompatible,
        "lm_head has 12 rows in the adapter, 9 in the base model",
    ),
    "resized embeddings without head": (
        {},
        Q | {f"{EMBED}.weight": torch.ones(12, 8)},
        BASE,
        AdapterIncompatible,
        "lm_head is missing, and the adapter does not fit the base model: embed_tokens has 12 rows",
    ),
    "tables of two sizes": (
        {},
        Q | {f"{EMBED}.weight": torch.ones(12, 8), f"{HEAD}.weight": TABLE},
        BASE,
        AdapterIncompatible,
        "embed_tokens has 12 rows in the adapter, 9 in the base model",
    ),
    "tables without rows": (
        {},
        Q | {f"{EMBED}.weight": torch.ones(0, 8), f"{HEAD}.weight": torch.ones(0, 8)},
        BASE,
        AdapterIncompatible,
        "embed_tokens has 0 rows in the adapter, 9 in the base model",
    ),
    "LoRA on a table that was resized otherwise": (
        {},
        pair(HEAD, 8, 12) | {f"{EMBED}.weight": torch.ones(13, 8), f"{HEAD}.base_layer.weight": torch.ones(13, 8)},
        BASE,
        AdapterIncompatible,
        "lm_head has 12 rows in the adapter, 9 in the base model",
    ),
    "lora_bias on a resized head": (
        {"lora_bias": True},
        pair(HEAD, 8, 12)
        | {f"{HEAD}.lora_B.bias": torch.ones(12), f"{HEAD}.base_layer.weight": torch.ones(12, 8)}
        | {f"{EMBED}.weight": torch.ones(12, 8)},
        BASE,
        AdapterUnsupported,
        "lora_bias on a lm_head with another vocabulary",
    ),
    "tables of another width": (
        {},
        Q | {f"{EMBED}.weight": torch.ones(12, 7), f"{HEAD}.weight": torch.ones(12, 7)},
        BASE,
        AdapterIncompatible,
        "expected [12, 8], found [12, 7]",
    ),
    "saved head of another vocabulary": (
        {"modules_to_save": ["lm_head"]},
        Q | {f"{HEAD}.weight": torch.ones(7, 8)},
        BASE,
        AdapterIncompatible,
        "lm_head has 7 rows in the adapter, 9 in the base model",
    ),
    "rows that the config does not know": ({}, Q | DELTA, BASE, AdapterInvalid, "left over: trainable_token_indices"),
    "rows missing": (TOKENS, Q, BASE, AdapterInvalid, "trainable_token_indices means embed_tokens, whose rows are"),
    "too many rows": (
        {"trainable_token_indices": [3]},
        Q | DELTA,
        BASE,
        AdapterIncompatible,
        "expected [1, 8], found [2, 8]",
    ),
    "a token beyond the vocabulary": (
        {"trainable_token_indices": [3, 9]},
        Q | DELTA,
        BASE,
        AdapterIncompatible,
        "token 9 is beyond the vocabulary of 9",
    ),
    "rows of no table": (
        {"trainable_token_indices": {"q_proj": [1]}},
        Q,
        BASE,
        AdapterIncompatible,
        "'q_proj' is neither embed_tokens nor lm_head",
    ),
    "rows and LoRA": (TOKENS, ON_EMBED | DELTA, BASE, AdapterInvalid, "PEFT does not load that"),
    "rows of a saved module": (
        TOKENS | {"modules_to_save": ["embed_tokens"]},
        Q | DELTA | {f"{EMBED}.weight": TABLE},
        BASE,
        AdapterInvalid,
        "PEFT does not load that",
    ),
    "tied rows and a saved head": (
        TOKENS | {"modules_to_save": ["lm_head"]},
        Q | DELTA | {f"{HEAD}.weight": TABLE},
        TIED,
        AdapterInvalid,
        "PEFT does not load that",
    ),
    "tied rows that differ": (
        {"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}, "ensure_weight_tying": True},
        Q | DELTA,
        TIED,
        AdapterInvalid,
        "differ, but ensure_weight_tying",
    ),
    "tied copies that differ": (
        {},
        Q | {f"{EMBED}.weight": TABLE, f"{HEAD}.weight": 2 * TABLE},
        TIED,
        AdapterInvalid,
        "the word embeddings are tied",
    ),
    "tied saved tables that differ": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        Q | {f"{EMBED}.weight": TABLE, f"{HEAD}.weight": 2 * TABLE},
        TIED,
        AdapterInvalid,
        "the word embeddings are tied",
    ),
    "tied LoRA on one table only": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        ON_EMBED,
        TIED,
        AdapterInvalid,
        "only one of embed_tokens and lm_head has LoRA",
    ),
    "tied LoRA that differs": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        ON_EMBED | pair(HEAD, 8, 9) | {f"{HEAD}.lora_B.weight": torch.zeros(9, 2)},
        TIED,
        AdapterInvalid,
        "lm_head and embed_tokens differ",
    ),
    "activated with a saved module": (
        {"alora_invocation_tokens": [1], "modules_to_save": ["lm_head"]},
        Q | {f"{HEAD}.weight": TABLE},
        BASE,
        AdapterUnsupported,
        "activated LoRA (alora_invocation_tokens) with a trained lm_head",
    ),
    "activated with a bias": (
        {"alora_invocation_tokens": [1], "bias": "lora_only"},
        V | V_BIAS,
        BASE,
        AdapterUnsupported,
        "with a trained v_proj",
    ),
    "activated on embeddings": (
        {"alora_invocation_tokens": [1]},
        ON_EMBED,
        BASE,
        AdapterInvalid,
        "PEFT does not have it",
    ),
    "velora's tensor without velora": (
        {},
        Q | {f"{Q0}.lora_velora_embed": torch.ones(4)},
        BASE,
        AdapterInvalid,
        "left over: velora_config is not set",
    ),
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


@pytest.mark.parametrize("case", FEATURES)
def test_wrong_features(case: str, tmp_path: Path) -> None:
    config, tensors, base, error, said = FEATURES[case]
    write(tmp_path, tensors, **config)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path, base, AdapterLimits())
    assert type(caught.value) is error, caught.value
    assert said in caught.value.message
    assert "adapter_model.safetensors" in caught.value.message or "adapter_config.json" in caught.value.message


def test_layers_that_the_config_leaves_out(tmp_path: Path) -> None:
    write(tmp_path, pair(Q0, 8, 8), target_modules=["q_proj"], layers_to_transform=[1])
    with pytest.raises(AdapterInvalid, match=r"does not target module 'model.layers.0.self_attn.q_proj'"):
        read_adapter(tmp_path, BASE, AdapterLimits())


def test_files_that_change_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, pair(Q0, 8, 8))
    marks = iter(["before", "after"])
    monkeypatch.setattr(checkpoint, "identity", lambda _: next(marks))
    with pytest.raises(AdapterInvalid, match="changed while they were read"):
        read_adapter(tmp_path, BASE, AdapterLimits())
