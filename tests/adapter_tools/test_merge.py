"""Merging against PEFT's merge_and_unload, for each kind of thing that an adapter can be."""

import json
import shutil
from functools import partial

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from multilora import LLM
from multilora.adapter_tools.merge import merge
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine
from multilora.errors import AdapterUnsupported, ConfigError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": {"target_modules": ALL, "r": 4, "lora_alpha": 8},
    "rslora with patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 8},
        "alpha_pattern": {"q_proj": 3},
    },
    "dora": {"target_modules": ALL, "r": 4, "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 4},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 50]}},
}

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # PEFT's and transformers' own


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    """An engine without a loader process."""
    monkeypatch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("merge") / "model"
    make_tiny_model(path)
    return path


def by_peft(model, adapter):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft(model, tmp_path, kind):
    make_adapter(tmp_path / "adapter", model, **KINDS[kind])
    found = merge(str(tmp_path / "adapter"), str(model), tmp_path / "merged")
    expected = by_peft(model, tmp_path / "adapter").state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    assert found.changed == sum(not torch.equal(base[name], tensor) for name, tensor in ours.items()) > 0


def test_biases(tmp_path):
    make_tiny_model(tmp_path / "model", "qwen2")
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, "bias": "lora_only"}
    make_adapter(tmp_path / "adapter", tmp_path / "model", **options)
    merge(str(tmp_path / "adapter"), str(tmp_path / "model"), tmp_path / "merged")
    expected = by_peft(tmp_path / "model", tmp_path / "adapter").state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_the_merged_model_answers_as_the_adapter(model, tmp_path):
    make_adapter(tmp_path / "adapter", model, **KINDS["dora"])
    merge(str(tmp_path / "adapter"), str(model), tmp_path / "merged")
    params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    options = {"skip_tokenizer_init": True, "device": "cpu"}
    with LLM(str(model), lora_paths={"a": str(tmp_path / "adapter")}, **options) as llm:
        asked = llm.generate([5, 6, 7], params, "a").token_ids
        assert asked != llm.generate([5, 6, 7], params).token_ids
    with LLM(str(tmp_path / "merged"), **options) as llm:
        assert llm.generate([5, 6, 7], params).token_ids == asked


def test_shards_dtype_and_other_files(model, tmp_path):
    """A checkpoint in bf16 and two files stays one; tokenizers are copied, the adapter's before the model's."""
    shutil.copytree(model, tmp_path / "model")
    tensors = {n: t.bfloat16() for n, t in load_file(tmp_path / "model" / "model.safetensors").items()}
    (tmp_path / "model" / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, tmp_path / "model" / file)
    weight_map = {name: file for file, own in parts.items() for name in own}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).write_text("base")
    make_adapter(tmp_path / "adapter", model, **KINDS["lora"])
    (tmp_path / "adapter" / "chat_template.jinja").write_text("adapter")
    found = merge(str(tmp_path / "adapter"), str(tmp_path / "model"), tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == weight_map and index["metadata"]["total_size"] == found.nbytes
    ours = load_file(tmp_path / "merged" / "model-1.safetensors")
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "adapter"
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == "base"


def test_refusals(model, tmp_path):
    make_adapter(tmp_path / "alora", model, target_modules=["q_proj"], alora_invocation_tokens=[3, 4])
    with pytest.raises(AdapterUnsupported, match="activated LoRA"):
        merge(str(tmp_path / "alora"), str(model), tmp_path / "merged")
    make_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    make_adapter(tmp_path / "head", tmp_path / "tied", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(AdapterUnsupported, match="one table"):
        merge(str(tmp_path / "head"), str(tmp_path / "tied"), tmp_path / "merged")
    make_adapter(tmp_path / "lora", model, **KINDS["lora"])
    with pytest.raises(ConfigError, match="no such directory"):
        merge(str(tmp_path / "lora"), "/nowhere", tmp_path / "merged")
    with pytest.raises(ConfigError, match="--out"):
        merge(str(tmp_path / "lora"), str(model), model)
    assert not (tmp_path / "merged").exists()


def test_a_quantised_model(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    make_adapter(tmp_path / "lora", model, **KINDS["lora"])
    with pytest.raises(ConfigError, match="quantised"):
        merge(str(tmp_path / "lora"), str(tmp_path / "model"), tmp_path / "merged")


def test_experts_are_refused(tmp_path):
    make_tiny_model(tmp_path / "model", "mixtral")
    make_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(AdapterUnsupported, match="experts"):
        merge(str(tmp_path / "adapter"), str(tmp_path / "model"), tmp_path / "merged")
