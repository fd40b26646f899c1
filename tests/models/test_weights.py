"""Nothing in a checkpoint is guessed: missing, left-over, misshapen and broken files are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes.models import make_tiny_model
from loaded_model import loaded_model as load
from safetensors.torch import load_file, save_file

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.linear import Linear
from multilora.lora.sites import MODEL_LEVEL
from multilora.models.weights import destinations

Edit = Callable[[dict[str, torch.Tensor]], None]
UP = "model.layers.1.mlp.up_proj.weight"


def edited(path: Path, edit: Edit, **overrides: object) -> Path:
    """A tiny llama in `path` whose only weight file has been changed by `edit`."""
    make_tiny_model(path, "llama", **overrides)
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


def test_slices_lie_where_they_belong(tmp_path: Path) -> None:
    reference = make_tiny_model(tmp_path, "qwen2", max_shard_size="50KB")
    model = load(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    theirs = dict(reference.named_parameters())
    ours = destinations(model)
    assert {name: where.shape for name, where in ours.items()} == {n: tuple(t.shape) for n, t in theirs.items()}
    for layer in range(2):
        for parent, modules in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for module in (f"{m}_proj" for m in modules):
                weight, bias = model.base_weight(layer, module)
                name = f"model.layers.{layer}.{parent}.{module}"
                assert torch.equal(weight, theirs[f"{name}.weight"]), name
                assert (bias is not None) == (f"{name}.bias" in theirs)
                assert bias is None or torch.equal(bias, theirs[f"{name}.bias"]), name
    for name, param in model.named_parameters():
        if "_proj" not in name:
            assert torch.equal(param, theirs[name]), name
    assert torch.equal(model.base_weight(MODEL_LEVEL, "lm_head")[0], theirs["lm_head.weight"])
    names = [f"model.layers.1.self_attn.{m}_proj" for m in "qkv"]
    merged = model.get_submodule("model.layers.1.self_attn.qkv_proj")
    assert isinstance(merged, Linear)
    assert torch.equal(merged.weight.dequantised(slice(None)), torch.cat([theirs[f"{n}.weight"] for n in names]))


@pytest.mark.parametrize("tied", [True, False])
def test_superfluous_tensors_are_skipped(tmp_path: Path, tied: bool) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        if tied:
            assert "lm_head.weight" not in tensors
            tensors["lm_head.weight"] = torch.full((101, 64), torch.nan)

    model = load(edited(tmp_path, edit, tie_word_embeddings=tied))
    head = model.base_weight(MODEL_LEVEL, "lm_head")[0]
    assert (head is model.get_parameter("model.embed_tokens.weight")) == tied
    assert head.isfinite().all()


def drop_up(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


def drop_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def add_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].T.contiguous()


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].to(torch.int8)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (drop_up, f"lacks {UP}"),
        (drop_head, "lacks lm_head.weight"),
        (add_bias, r"q_proj\.bias, which the model would not use"),
        (transpose, rf"{UP} has shape \[64, 96\], the config asks for \[96, 64\]"),
        (quantize, f"{UP} is I8"),
    ],
)
def test_mismatch_is_named(tmp_path: Path, edit: Edit, said: str) -> None:
    with pytest.raises(ModelUnsupported, match=said):
        load(edited(tmp_path, edit))


def test_truncated_file(tmp_path: Path) -> None:
    file = edited(tmp_path, lambda tensors: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a readable safetensors file"):
        load(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(tmp_path)
    make_tiny_model(tmp_path, max_shard_size="50KB")
    shard = next(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ConfigError, match=f"lists {shard.name}, which is not there"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load(tmp_path)


def test_unsupported_architecture_is_refused_before_weights(tmp_path: Path) -> None:
    raw = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelUnsupported, match="MambaForCausalLM"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["XForCausalLM"], "model_type": "x"}))
    with pytest.raises(ModelUnsupported, match="XForCausalLM"):
        load(tmp_path)


def test_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(tmp_path)
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelUnsupported, match="65"):
        load(tmp_path)


def test_dummy_needs_only_the_config_and_is_seeded(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    models = [load(tmp_path, load_format="dummy", seed=seed) for seed in (0, 0, 1)]
    first, same, other = (dict(m.named_parameters()) for m in models)
    for name, param in first.items():
        assert param.isfinite().all(), name
        assert param.std() < 0.1, name
        assert torch.equal(param, same[name]), name
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(
    ("asked", "got"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_dtype(tmp_path: Path, asked: str, got: torch.dtype) -> None:
    make_tiny_model(tmp_path, dtype="bfloat16")
    model = load(tmp_path, dtype=asked)
    assert model.config.dtype == model.config.kv_dtype == model.config.adapter_dtype == got
    assert {p.dtype for p in model.parameters()} == {got}
    assert model.kv_layout(4).dtype == got


def test_a_quantised_head_is_refused_by_name(tmp_path: Path) -> None:
    """The config quantises linear layers; embedding and head cannot be."""

    def quantise_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)

    with pytest.raises(ModelUnsupported, match=r"lm_head\.weight is F8_E4M3: it can be served in 16 or 32 bit"):
        load(edited(tmp_path, quantise_head))
