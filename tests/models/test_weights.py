"""Nothing in a checkpoint is guessed: missing, left-over, misshapen and broken files are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes.models import make_tiny_model
from safetensors.torch import load_file, save_file

from multilora.errors import ConfigError, ModelUnsupported
from multilora.models.llama import LlamaForCausalLM
from multilora.models.load import load_model
from multilora.models.weights import destinations

Edit = Callable[[dict[str, torch.Tensor]], None]
CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


def load(path: Path, **options: object) -> LlamaForCausalLM:
    return load_model(str(path), device=CPU, **options)[0]  # type: ignore[arg-type]


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
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    attention = model.model.layers[1].self_attn
    names = [f"model.layers.1.self_attn.{m}_proj" for m in "qkv"]
    assert torch.equal(attention.qkv_proj.weight, torch.cat([theirs[f"{n}.weight"] for n in names]))
    assert torch.equal(attention.qkv_proj.bias, torch.cat([theirs[f"{n}.bias"] for n in names]))


@pytest.mark.parametrize("tied", [True, False])
def test_superfluous_tensors_are_skipped(tmp_path: Path, tied: bool) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        if tied:
            assert "lm_head.weight" not in tensors
            tensors["lm_head.weight"] = torch.full((101, 64), torch.nan)

    model = load(edited(tmp_path, edit, tie_word_embeddings=tied))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.isfinite().all()


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
    raw = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelUnsupported, match="GPT2LMHeadModel"):
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
    model, config = load_model(str(tmp_path), device=CPU, dtype=asked)
    assert config.dtype == got
    assert {p.dtype for p in model.parameters()} == {got}
    assert model.kv_layout(4).dtype == got
