"""Every row of the parity table, block by block: put into a plain model's weights, they give PEFT's logits.

Covers `peft/checkpoint_full_weights.py`, `peft/checkpoint_lora.py`, `peft/contents.py`, `adapter.py` too.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_adapter
from peft_rows import INVOCATION, ROWS, TIED, Lab, Row, renamed
from transformers import AutoConfig, AutoModelForCausalLM

from multilora.adapters.adapter import Adapter, AdapterLimits, Full, LowRank, Rows, Vector, VectorKind
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.checkpoint import read_adapter
from multilora.errors import AdapterError, AdapterIncompatible
from multilora.models.load import make_model

SERVED = [row for row in ROWS if row.refused is None]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def by_feature(rows: list[Row]) -> Any:
    return pytest.mark.parametrize("row", rows, ids=[row.feature for row in rows])


def row_of(feature: str) -> Row:
    return next(row for row in ROWS if row.feature == feature)


def base_of(path: Path, weights: bool = True) -> BaseModel:
    return BaseModel.of(make_model(str(path), device=torch.device("meta")), str(path) if weights else None)


def read(lab: Lab, row: Row, limits: AdapterLimits = AdapterLimits(), weights: bool = True) -> Adapter:  # noqa: B008
    return read_adapter(lab.adapter(row), base_of(lab.model(row.model), weights), limits)


def path_of(layer: int, module: str) -> str:
    if module == "lm_head":
        return module
    if layer < 0:
        return f"model.{module}"
    parent = "mlp." if module in ("gate_proj", "up_proj", "down_proj") else "self_attn."
    return f"model.layers.{layer}.{'' if module.endswith('layernorm') else parent}{module}"


def merged(adapter: Adapter, model_path: Path) -> Any:
    """transformers' model, untied, with the adapter's blocks in its weights: what each block says, literally."""
    config = AutoConfig.from_pretrained(model_path)
    tied, config.tie_word_embeddings = config.tie_word_embeddings, False
    model = AutoModelForCausalLM.from_pretrained(model_path, config=config, dtype=torch.float32)
    if tied:
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())

    def module(block: Any) -> Any:
        return model.get_submodule(path_of(getattr(block, "layer", -1), block.module))

    def of(kind: type | VectorKind) -> list[Any]:
        return [b for b in adapter.blocks if (b.kind if isinstance(b, Vector) else type(b)) is kind]

    for block in of(Full):
        if block.weight.ndim == 2 and len(block.weight) != len(module(block).weight):
            model.resize_token_embeddings(len(block.weight), mean_resizing=False)  # added tokens
        module(block).weight.data = block.weight.float()
    for block in of(Rows):
        module(block).weight.data[list(block.token_ids)] = block.weight.float()
    for block in of(LowRank):
        delta = block.scaling * (block.b.float().T @ block.a.float())  # [out, in]
        module(block).weight.data += delta.T if block.module == "embed_tokens" else delta
    for block in of(VectorKind.MAGNITUDE):
        weight = module(block).weight.data
        module(block).weight.data = weight * (block.value.float() / weight.norm(dim=1))[:, None]
    for block in of(VectorKind.BIAS):
        assert module(block).bias is not None
        module(block).bias.data = block.value.float()
    for block in of(VectorKind.LORA_BIAS):
        linear = module(block)
        before = torch.zeros_like(block.value) if linear.bias is None else linear.bias.data
        linear.bias = torch.nn.Parameter(before + block.scaling * block.value)
    return model.eval()


@by_feature(SERVED)
def test_blocks_are_what_peft_computes(row: Row, lab: Lab) -> None:
    adapter = read(lab, row)
    prompts = row.prompts(4)
    if adapter.invocation_tokens is not None:  # let it act from the start
        assert adapter.invocation_tokens == tuple(INVOCATION)
        prompts = [prompt[prompt.index(INVOCATION[0]) :] for prompt in prompts]
    ids = torch.tensor(prompts)
    with torch.no_grad():
        expected = lab.reference(row)(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(lab.model(row.model), dtype=torch.float32)(
            ids.clamp(max=100)
        ).logits
        torch.testing.assert_close(merged(adapter, lab.model(row.model))(ids).logits, expected, **CLOSE)
    shared = min(expected.shape[-1], base.shape[-1])
    assert (expected[..., :shared] - base[..., :shared]).abs().max() > 0.05, "the adapter does nothing"


@by_feature([row for row in ROWS if row.refused is not None])
def test_refused_by_name(row: Row, lab: Lab) -> None:
    with pytest.raises(AdapterError) as caught:
        read(lab, row)
    assert row.refused is not None and row.refused in caught.value.message
    assert "adapter_config.json" in caught.value.message or "adapter_model.safetensors" in caught.value.message


def kinds(adapter: Adapter, where: Callable[[Any], bool] = lambda block: True) -> set[tuple[str, str]]:
    return {(type(b).__name__, b.module) for b in adapter.blocks if where(b)}


def test_copies_of_the_base_model_s_tables_are_dropped(lab: Lab) -> None:
    plain = row_of("`save_embedding_layers`, tables as in the base model")
    assert {kind for kind, _ in kinds(read(lab, plain))} == {"LowRank"}
    assert ("Full", "lm_head") in kinds(read(lab, plain, weights=False))
    under = row_of("`save_embedding_layers` under LoRA on `lm_head`, tables as in the base model")
    assert kinds(read(lab, under)) == {("LowRank", "lm_head"), ("LowRank", "q_proj")}


def test_other_tables_replace_the_base_model_s(lab: Lab) -> None:
    untied = row_of("`save_embedding_layers` under LoRA on both tables, other tables")
    tables = {("Full", "embed_tokens"), ("Full", "lm_head"), ("LowRank", "embed_tokens"), ("LowRank", "lm_head")}
    assert kinds(read(lab, untied)) == tables
    tied = row_of("`save_embedding_layers`, another table, tied")
    assert kinds(read(lab, tied), lambda b: b.layer < 0) == {("Full", "embed_tokens"), ("Full", "lm_head")}
    rows = row_of("`save_embedding_layers` with `trainable_token_indices`, another table, tied")
    assert not any(isinstance(block, Rows) for block in read(lab, rows).blocks), "rows are in the table already"


def test_rows_are_sorted(lab: Lab) -> None:
    rows = [b for b in read(lab, row_of("`trainable_token_indices`, tied")).blocks if isinstance(b, Rows)]
    assert [(block.module, block.token_ids) for block in rows] == [
        ("embed_tokens", (3, 7, 40)),
        ("lm_head", (3, 7, 40)),
    ]


def test_ensured_ties_without_a_tied_model(lab: Lab) -> None:
    """PEFT warns and does not tie; a file saved for a tied model still says all there is to say."""
    row = next(r for r in ROWS if r.model == TIED and r.config.get("modules_to_save") and "ensure" in r.feature)
    adapter = read_adapter(lab.adapter(row), base_of(lab.model("Llama")), AdapterLimits())
    assert {("Full", "embed_tokens"), ("Full", "lm_head")} <= kinds(adapter)


@pytest.mark.parametrize(
    ("feature", "module"),
    [
        ("LoRA on `embed_tokens`", "embed_tokens"),
        ("LoRA on `lm_head`", "lm_head"),
        ("`modules_to_save`: `lm_head`", "lm_head"),
        ("`trainable_token_indices`", "embed_tokens"),
        ("`save_embedding_layers`, another table, tied", "embed_tokens"),
        ('`bias` "all"', "k_proj"),
    ],
)
def test_limits_know_every_module(feature: str, module: str, lab: Lab) -> None:
    row = row_of(feature)
    touched = {block.module for block in read(lab, row).blocks}
    read(lab, row, AdapterLimits(target_modules=tuple(touched)))
    with pytest.raises(AdapterIncompatible, match=rf"it targets {module}, which --lora-target-modules"):
        read(lab, row, AdapterLimits(target_modules=tuple(touched - {module})))


def test_norms_are_no_target_modules(lab: Lab) -> None:
    read(lab, row_of("`modules_to_save`: norms"), AdapterLimits(target_modules=("q_proj", "v_proj", "down_proj")))


def test_the_rank_limit_counts_embeddings(lab: Lab) -> None:
    with pytest.raises(AdapterIncompatible, match="rank 4 is over --max-lora-rank 3"):
        read(lab, row_of("LoRA on `embed_tokens`"), AdapterLimits(max_rank=3))


def retrained(lab: Lab, tmp_path: Path, rows: list[int]) -> Adapter:
    """modules_to_save with embed_tokens, of which training changed only these rows."""
    path = lab.model("Llama")
    model = make_adapter(tmp_path, path, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    table = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).get_input_embeddings().weight.data
    table[rows] += 1
    model.get_input_embeddings().modules_to_save["default"].weight.data.copy_(table)
    model.save_pretrained(str(tmp_path))
    return read_adapter(tmp_path, base_of(path), AdapterLimits())


def test_of_a_table_only_the_rows_that_differ(lab: Lab, tmp_path: Path) -> None:
    found = [block for block in retrained(lab, tmp_path, [90, 4, 17]).blocks if not isinstance(block, LowRank)]
    (rows,) = found
    assert isinstance(rows, Rows) and rows.token_ids == (4, 17, 90) and rows.weight.shape == (3, 64)
    assert ("Full", "embed_tokens") in kinds(retrained(lab, tmp_path, list(range(60))))
    assert kinds(retrained(lab, tmp_path, [])) == {("LowRank", "q_proj")}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("k_proj.weight", "k_proj.modules_to_save.weight"),
        (
            ("k_proj.", "lora_A.", "lora_B."),
            ("k_proj.modules_to_save.default.", "lora_A.default.", "lora_B.default."),
        ),
        ("base_model.model.model.", "base_model.model."),  # trained on the model without its head
    ],
)
def test_other_spellings_of_saved_modules(old: Any, new: Any, lab: Lab, tmp_path: Path) -> None:
    row = row_of("`modules_to_save`: a linear layer with its bias")
    expected = read(lab, row)
    shutil.copytree(lab.adapter(row), tmp_path / "a")
    changes = [(old, new)] if isinstance(old, str) else zip(old, new, strict=True)
    renamed(*changes)(tmp_path / "a")
    found = read_adapter(tmp_path / "a", base_of(lab.model(row.model)), AdapterLimits())
    assert kinds(found) == kinds(expected) and len(found.blocks) == len(expected.blocks)


def test_a_base_model_whose_files_are_gone(lab: Lab, tmp_path: Path) -> None:
    row = row_of("`save_embedding_layers`, tables as in the base model")
    base = replace(base_of(lab.model(row.model)), weights_dir=str(tmp_path))
    with pytest.raises(AdapterError, match="cannot be read for a comparison"):
        read_adapter(lab.adapter(row), base, AdapterLimits())
