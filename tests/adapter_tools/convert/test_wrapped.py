"""PEFT's own adapters, with what trainers leave in them."""

import pytest
import torch

from multilora.adapter_tools.convert.wrapped import read_pickle, read_wrapped
from multilora.errors import AdapterInvalid, AdapterUnsupported

CLEAN = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "name",
    [
        CLEAN,
        "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight",
        "_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
        "base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_names_of_wrappers(name):
    found = read_wrapped(CONFIG, {name: torch.zeros(1)})
    assert list(found.tensors) == [CLEAN]
    assert bool(found.notes) == (name != CLEAN)


def test_unsloth():
    raw = CONFIG | {
        "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
        "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
        "qalora_group_size": 16,
        "some_future_field": None,
    }
    found = read_wrapped(raw, {CLEAN: torch.zeros(1)})
    assert found.writer == "Unsloth" and "quantised" in found.notes[0]
    assert "some_future_field" not in found.config and found.config["r"] == 4


def test_refused_by_name():
    with pytest.raises(AdapterUnsupported, match="own_field: what it means"):
        read_wrapped(CONFIG | {"own_field": 3}, {CLEAN: torch.zeros(1)})
    with pytest.raises(AdapterInvalid, match="PEFT writes no such tensor"):
        read_wrapped(CONFIG, {"optimizer.state": torch.zeros(1)})
    with pytest.raises(AdapterInvalid, match="twice"):
        read_wrapped(CONFIG, {CLEAN: torch.zeros(1), f"_orig_mod.{CLEAN}": torch.zeros(1)})


def test_pickles_hold_tensors_only(tmp_path):
    torch.save({CLEAN: torch.ones(2)}, tmp_path / "good.bin")
    assert torch.equal(read_pickle(tmp_path / "good.bin")[CLEAN], torch.ones(2))
    torch.save({CLEAN: print}, tmp_path / "code.bin")
    with pytest.raises(AdapterInvalid, match=r"code.bin holds more than tensors"):
        read_pickle(tmp_path / "code.bin")
    torch.save({CLEAN: "text"}, tmp_path / "text.bin")
    with pytest.raises(AdapterInvalid, match="no table of tensors"):
        read_pickle(tmp_path / "text.bin")
    (tmp_path / "broken.bin").write_bytes(b"hello")
    with pytest.raises(AdapterInvalid, match=r"broken.bin"):
        read_pickle(tmp_path / "broken.bin")
