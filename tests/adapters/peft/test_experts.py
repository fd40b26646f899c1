"""Adapters on experts as their files hold them: what becomes of each layout, and what does not fit is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multilora.adapters.adapter import Adapter, AdapterLimits, LowRank
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.checkpoint import read_adapter
from multilora.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from multilora.lora.sites import LoraSite, LoraSlice

Tensors = dict[str, torch.Tensor]
COUNT, HIDDEN, INNER = 3, 8, 6
GATE_UP = LoraSlice(
    "experts.gate_up_proj", 0, 2 * INNER, "mlp.experts", attribute="gate_up_proj", parts=("gate_proj", "up_proj")
)
DOWN = LoraSlice("experts.down_proj", 0, HIDDEN, "mlp.experts", attribute="down_proj", parts=("down_proj",))
SITES = (
    LoraSite(0, 0, "gate", HIDDEN, (LoraSlice("gate", 0, COUNT, "mlp"),)),
    LoraSite(1, 0, "experts.gate_up_proj", HIDDEN, (GATE_UP,), COUNT),
    LoraSite(2, 0, "experts.down_proj", INNER, (DOWN,), COUNT),
)
OLDER = ((".block_sparse_moe.", ".mlp."), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."))
BASE = BaseModel(SITES, (), vocab_size=9, hidden_size=HIDDEN, tie_word_embeddings=False, older_names=OLDER)
EXPERTS = "base_model.model.model.layers.0.mlp.experts"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": []}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
FUSED = CONFIG | {"target_parameters": BOTH}
SINGLE = CONFIG | {"target_modules": ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]}
NO_LIMITS = AdapterLimits()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair(at: str, *shapes: tuple[int, ...]) -> Tensors:
    return {f"{at}.lora_{part}.weight": random(*shape) for part, shape in zip("AB", shapes, strict=True)}


def single(expert: int, module: str, rank: int = 2, at: str = EXPERTS) -> Tensors:
    width_in, width_out = (INNER, HIDDEN) if module in ("down_proj", "w2") else (HIDDEN, INNER)
    return pair(f"{at}.{expert}.{module}", (rank, width_in), (width_out, rank))


def read(path: Path, tensors: Tensors, config: dict[str, Any] = SINGLE, limits: AdapterLimits = NO_LIMITS) -> Adapter:
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return read_adapter(path, BASE, limits)


def blocks(adapter: Adapter) -> dict[str, LowRank]:
    assert all(isinstance(block, LowRank) for block in adapter.blocks)
    return {block.module: block for block in adapter.blocks if isinstance(block, LowRank)}


def deltas(block: LowRank) -> torch.Tensor:
    """scaling · BA of every expert, [experts, out, in]."""
    return (block.scaling * (block.b.float().mT @ block.a.float())).expand(COUNT, -1, -1)


def test_wrappers_are_told_apart_by_the_parameters_that_are_targeted(tmp_path: Path) -> None:
    inner = pair(f"{EXPERTS}.base_layer", (COUNT * 2, HIDDEN), (2 * INNER, 2 * COUNT))
    outer = pair(EXPERTS, (COUNT * 2, INNER), (HIDDEN, 2 * COUNT))
    found = blocks(read(tmp_path, inner | outer, FUSED))
    for name, tensors, at in (
        ("experts.gate_up_proj", inner, f"{EXPERTS}.base_layer"),
        ("experts.down_proj", outer, EXPERTS),
    ):
        a, b = tensors[f"{at}.lora_A.weight"], tensors[f"{at}.lora_B.weight"]
        for expert, delta in enumerate(deltas(found[name])):
            own = b[:, expert::COUNT] @ a[2 * expert : 2 * expert + 2]
            torch.testing.assert_close(delta, 2.0 * own)
    alone = read(tmp_path, outer, CONFIG | {"target_parameters": BOTH[1:]})
    assert alone.target_modules == ["experts.down_proj"]


def test_a_module_per_expert_becomes_one_block(tmp_path: Path) -> None:
    """Other ranks, other scalings, experts and halves without any: zeros fill the gaps."""
    config = SINGLE | {"rank_pattern": {"experts.2.up_proj": 3}, "alpha_pattern": {"experts.0.gate_proj": 7}}
    tensors = single(0, "gate_proj") | single(2, "gate_proj") | single(2, "up_proj", rank=3) | single(1, "down_proj")
    adapter = read(tmp_path, tensors, config)
    found = blocks(adapter)
    expected = torch.zeros(COUNT, 2 * INNER, HIDDEN)
    for expert, module, rows, scaling in (
        (0, "gate_proj", 0, 3.5),
        (2, "gate_proj", 0, 2.0),
        (2, "up_proj", INNER, 4 / 3),
    ):
        at = f"{EXPERTS}.{expert}.{module}"
        delta = tensors[f"{at}.lora_B.weight"] @ tensors[f"{at}.lora_A.weight"]
        expected[expert, rows : rows + INNER] = scaling * delta
    torch.testing.assert_close(deltas(found["experts.gate_up_proj"]), expected)
    assert found["experts.gate_up_proj"].a.shape == (COUNT, 5, HIDDEN)
    assert found["experts.down_proj"].a.shape == (COUNT, 2, INNER)
    assert deltas(found["experts.down_proj"])[[0, 2]].count_nonzero() == 0
    assert adapter.rank == 3


def test_older_names(tmp_path: Path) -> None:
    older = EXPERTS.replace("mlp", "block_sparse_moe")
    tensors = single(1, "w1", at=older) | single(1, "w3", at=older) | single(1, "w2", at=older)
    found = blocks(read(tmp_path, tensors))
    up = tensors[f"{older}.1.w3.lora_B.weight"] @ tensors[f"{older}.1.w3.lora_A.weight"]
    torch.testing.assert_close(deltas(found["experts.gate_up_proj"])[1, INNER:], 2.0 * up)
    assert sorted(found) == ["experts.down_proj", "experts.gate_up_proj"]


@pytest.mark.parametrize("shared", [False, True])
def test_stacks(shared: bool, tmp_path: Path) -> None:
    """As SGLang has them: halves of their own, and outer matrices that all experts share."""
    outer = 1 if shared else COUNT
    tensors = pair(f"{EXPERTS}.w1", (outer, 2, HIDDEN), (COUNT, INNER, 2))
    tensors |= pair(f"{EXPERTS}.w3", (outer, 2, HIDDEN), (COUNT, INNER, 2))
    tensors |= pair(f"{EXPERTS}.w2", (COUNT, 2, INNER), (outer, HIDDEN, 2))
    found = blocks(read(tmp_path, tensors))
    assert found["experts.gate_up_proj"].a.shape == (outer, 4, HIDDEN)
    assert found["experts.down_proj"].b.shape == (outer, 2, HIDDEN)
    for module, rows in (("w1", slice(INNER)), ("w3", slice(INNER, None))):
        expected = 2.0 * (tensors[f"{EXPERTS}.{module}.lora_B.weight"] @ tensors[f"{EXPERTS}.{module}.lora_A.weight"])
        torch.testing.assert_close(deltas(found["experts.gate_up_proj"])[:, rows], expected)


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in (single(0, "gate_proj") | single(1, "up_proj")).items()}
    [block] = blocks(read(tmp_path, tensors)).values()
    assert (block.a.dtype, block.b.dtype, block.scaling) == (torch.bfloat16, torch.bfloat16, 2.0)


WRAPPED = pair(EXPERTS, (COUNT * 2, INNER), (HIDDEN, 2 * COUNT))
ONE = FUSED | {"target_parameters": BOTH[1:]}
WRONG: dict[str, tuple[type[AdapterError], Tensors, dict[str, Any], str]] = {
    "beyond the experts": (
        AdapterIncompatible,
        single(3, "up_proj"),
        SINGLE,
        r"tensor '\S+experts\.3\.up_proj\S+': expert 3 is out of range, the base model has 3 experts",
    ),
    "another number of experts": (
        AdapterIncompatible,
        pair(EXPERTS, (4 * 2, INNER), (HIDDEN, 2 * 4)),
        ONE,
        r"experts\.down_proj' does not fit .* 3 experts with rank 2 .* lora_A \[6, 6\] and lora_B \[8, 6\]; found",
    ),
    "another width": (
        AdapterIncompatible,
        pair(EXPERTS, (COUNT * 2, INNER), (HIDDEN + 1, 2 * COUNT)),
        ONE,
        r"found \[6, 6\] and \[9, 6\]",
    ),
    "the other parameter": (
        AdapterIncompatible,
        WRAPPED,
        FUSED | {"target_parameters": BOTH[:1]},
        r"experts\.gate_up_proj' does not fit",
    ),
    "a wrapper too many": (
        AdapterIncompatible,
        pair(f"{EXPERTS}.base_layer", (COUNT * 2, INNER), (HIDDEN, 2 * COUNT)),
        ONE,
        r"mlp\.experts\.base_layer' is a wrapper, but target_parameters in \S+ means 1 of gate_up_proj",
    ),
    "parameters that are not targeted": (
        AdapterIncompatible,
        WRAPPED,
        CONFIG | {"target_modules": ["q_proj"]},
        r"'model\.layers\.0\.mlp\.experts' is a wrapper, but target_parameters in \S+ means 0 of gate_up_proj",
    ),
    "a module that is not targeted": (
        AdapterInvalid,
        single(1, "up_proj"),
        CONFIG | {"target_modules": ["gate_proj"]},
        r"does not target module '\S+experts\.1\.up_proj'",
    ),
    "another rank": (AdapterIncompatible, single(1, "up_proj", rank=3), SINGLE, r"with rank 2 .* found \[3, 8\]"),
    "B alone": (
        AdapterInvalid,
        {k: v for k, v in single(1, "up_proj").items() if "lora_B" in k},
        SINGLE,
        "lora_B without its lora_A",
    ),
    "the same twice": (
        AdapterInvalid,
        single(1, "down_proj") | pair(f"{EXPERTS}.down_proj", (COUNT, 2, INNER), (COUNT, HIDDEN, 2)),
        SINGLE,
        "are the same columns of one expert",
    ),
    "a magnitude": (
        AdapterUnsupported,
        single(1, "up_proj") | {f"{EXPERTS}.1.up_proj.lora_magnitude_vector": torch.ones(INNER)},
        SINGLE | {"use_dora": True},
        r"lora_magnitude_vector of '\S+': on experts lora_A and lora_B are served, nothing else",
    ),
    "DoRA": (AdapterUnsupported, single(1, "up_proj"), SINGLE | {"use_dora": True}, "use_dora on experts"),
    "a full weight": (
        AdapterUnsupported,
        {f"{EXPERTS}.1.up_proj.weight": torch.ones(INNER, HIDDEN)},
        SINGLE | {"modules_to_save": ["up_proj"]},
        "weight of .*: on experts lora_A and lora_B are served",
    ),
    "parameters with DoRA": (
        AdapterInvalid,
        WRAPPED,
        ONE | {"use_dora": True},
        "target_parameters: cannot be combined with use_dora",
    ),
    "parameters, activated": (
        AdapterInvalid,
        WRAPPED,
        ONE | {"alora_invocation_tokens": [3]},
        "target_parameters: cannot be combined with alora_invocation_tokens",
    ),
    "parameters that are no list": (
        AdapterInvalid,
        WRAPPED,
        ONE | {"target_parameters": "experts"},
        "a list of strings",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    kind, tensors, config, message = WRONG[case]
    with pytest.raises(kind, match=message):
        read(tmp_path, tensors, config)


def test_limits(tmp_path: Path) -> None:
    tensors = single(1, "up_proj") | single(2, "gate_proj")
    with pytest.raises(AdapterIncompatible, match=r"rank 2 is over --max-lora-rank 1"):
        read(tmp_path, tensors, limits=AdapterLimits(max_rank=1))
    with pytest.raises(
        AdapterIncompatible, match=r"it targets experts\.gate_up_proj, which --lora-target-modules gate"
    ):
        read(tmp_path, tensors, limits=AdapterLimits(target_modules=("gate",)))
    for allowed in ("gate_up_proj", "experts.gate_up_proj"):
        assert read(tmp_path, tensors, limits=AdapterLimits(max_rank=2, target_modules=(allowed,))).rank == 2


def test_the_router_by_its_weight(tmp_path: Path) -> None:
    at = EXPERTS.replace("experts", "gate")
    config = CONFIG | {"target_parameters": ["gate.weight"], "rank_pattern": {"gate.weight": 3}}
    [block] = blocks(read(tmp_path, pair(at, (3, HIDDEN), (COUNT, 3)), config)).values()
    assert (block.module, block.rank, block.scaling) == ("gate", 3, 4 / 3)
