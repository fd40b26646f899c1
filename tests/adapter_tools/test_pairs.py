"""Pairs of matrices from a directory, and back."""

import json

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from multilora.adapter_tools.pairs import LoraPair, check_new, new_directory, peft_config, peft_tensors, read_pairs
from multilora.errors import AdapterInvalid, ConfigError

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # PEFT's and transformers' own


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    make_tiny_model(path / "model")
    options = dict(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"v_proj": 9}, alpha_pattern={"q_proj": 3})
    make_adapter(path / "adapter", path / "model", target_modules=["q_proj", "v_proj", "embed_tokens"], **options)
    return path


def test_deltas_are_peft_s(path):
    found = read_pairs(str(path / "adapter"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path / "model"), path / "adapter")
    modules = dict(model.base_model.model.named_modules())
    assert len(found.pairs) == 5
    assert list(found.others) == ["model.embed_tokens.base_layer.weight"]  # PEFT saves a copy of the table
    for name, pair in found.pairs.items():
        expected = modules[name].get_delta_weight("default")
        torch.testing.assert_close(pair.delta().T if pair.embedding else pair.delta(), expected)
    assert found.pairs["model.embed_tokens"].embedding
    assert found.pairs["model.layers.0.self_attn.v_proj"].rank == 9


def test_back_again(path):
    found = read_pairs(str(path / "adapter"))
    written = peft_tensors(found.pairs)
    original = load_file(path / "adapter" / "adapter_model.safetensors")
    assert written.keys() == {name for name in original if "base_layer" not in name}
    assert all(torch.equal(written[name], original[name]) for name in written)


def test_a_half_is_missing(path, tmp_path):
    tensors = load_file(path / "adapter" / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((path / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(AdapterInvalid, match="no matching lora_A and lora_B"):
        read_pairs(str(tmp_path))


def test_config_of_what_is_frequent_and_of_exceptions():
    ranks = {"model.layers.0.a": 8, "model.layers.1.a": 8, "model.layers.0.b": 4}
    config = peft_config(ranks, dict.fromkeys(ranks, 16.0) | {"model.layers.1.a": 1.0}, base_model="m", use_dora=True)
    assert (config["r"], config["rank_pattern"]) == (8, {"model.layers.0.b": 4})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (16.0, {"model.layers.1.a": 1.0})
    assert config["target_modules"] == ["a", "b"] and config["use_dora"] is True
    json.dumps(config)


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="--out"):
        check_new(tmp_path / "full")
    with pytest.raises(ConfigError, match="--out"):
        check_new(tmp_path / "full" / "file")
    with pytest.raises(ConfigError), new_directory(tmp_path / "new") as work:
        (work / "no" / "file").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with new_directory(tmp_path / "new") as work:
        (work / "file").write_text("")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_rank():
    assert LoraPair(torch.zeros(3, 5), torch.zeros(7, 3), 2.0).delta().shape == (7, 5)
