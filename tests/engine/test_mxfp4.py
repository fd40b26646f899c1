"""gpt-oss as it is published, its experts in MXFP4, answers as transformers and PEFT do over dequantised weights."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config, tiny_model
from counted_file import Counted
from fakes.engine_driver import EngineDriver
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from walk import adapter_configs, compare

from multilora.errors import ModelUnsupported
from multilora.models.load import make_model
from multilora.models.transformers_backend import weights
from multilora.planner.facts import PlannedRank

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat((VALUES, -VALUES))
Tensors = dict[str, torch.Tensor]


def in_blocks(shape: torch.Size, seed: int) -> tuple[Tensors, torch.Tensor]:
    """Random blocks and scales of a parameter [experts, in, out], and the numbers that they stand for."""
    experts, width, outs = shape
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (experts, outs, width // 32, 32), generator=g)
    scales = torch.randint(122, 126, codes.shape[:-1], generator=g)
    numbers = VALUES[codes] * 2.0 ** (scales[..., None] - 127).float()
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return {"blocks": blocks.byte(), "scales": scales.byte()}, numbers.flatten(2).transpose(1, 2).contiguous()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A directory with "model", in fp32, and "packed", the same with experts in blocks."""
    config = tiny_config("gpt_oss", "GptOssForCausalLM")
    config.hidden_size, config.intermediate_size = 64, 32
    model = tiny_model("GptOssForCausalLM", config)
    packed: Tensors = {}
    for seed, (name, param) in enumerate(model.named_parameters()):
        packed[name] = param.data
        if ".experts." in name and param.dim() == 3:
            stored, param.data = in_blocks(param.shape, seed)
            packed |= {f"{name}_{suffix}": tensor for suffix, tensor in stored.items()}
            del packed[name]
    model.save_pretrained(tmp_path / "model")
    directory = tmp_path / "packed"
    directory.mkdir()
    save_file(packed, directory / "model.safetensors")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    fields["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (directory / "config.json").write_text(json.dumps(fields))
    return tmp_path


def changed(root: Path, change: Any) -> Path:
    """The packed checkpoint with other tensors."""
    tensors = load_file(root / "packed" / "model.safetensors")
    change(tensors)
    save_file(tensors, root / "packed" / "model.safetensors")
    return root / "packed"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_with_adapters_as_peft_has_it_over_the_dequantised_weights(published: Path, ranks: int) -> None:
    """Two ranks have half a block of each expert's inner width each. Without the adapter under which the reference
    itself is 3e-4 from what it is in fp64."""
    model = make_model(str(published / "packed"), device=torch.device("meta"))
    configs = adapter_configs(model, set())
    if ranks > 1:
        del configs["some"]
    compare(published, configs, "auto", ranks, served="packed")


def first(tensors: Tensors, suffix: str) -> str:
    return next(name for name in tensors if name.endswith(suffix))


def test_a_rank_reads_the_blocks_that_it_needs(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of gate and up; of down, whose inner width is one block, all."""
    path, read = published / "packed", Counter[str]()
    monkeypatch.setattr(
        weights, "open_file", lambda file: Counted(safe_open(file, framework="pt", device="cpu"), read)
    )
    model = make_model(str(path), device=torch.device("cpu"), group=PlannedRank(2))
    model.load(str(path), load_format="auto", revision=None, seed=0)
    stored = load_file(path / "model.safetensors")
    parts = {name: read[name] / tensor.nbytes for name, tensor in stored.items() if ".experts." in name}
    assert {name.partition(".experts.")[2]: part for name, part in parts.items()} == {
        "gate_up_proj_blocks": 0.5,
        "gate_up_proj_scales": 0.5,
        "gate_up_proj_bias": 0.5,
        "down_proj_blocks": 1,
        "down_proj_scales": 1,
        "down_proj_bias": 1,
    }


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(first(t, "_scales")), "lacks .*_scales"),
        (lambda t: t.pop(first(t, "_blocks")), "lacks .*_blocks"),
        (lambda t: t.update({first(t, "_blocks"): t[first(t, "_blocks")][:, :-1].contiguous()}), "mxfp4 of"),
        (lambda t: t.update({first(t, "_blocks"): t[first(t, "_blocks")].float()}), "is F32"),
        (lambda t: t[first(t, "_scales")].fill_(255), "not finite in float32"),
        (lambda t: t.update({first(t, "_blocks").removesuffix("_blocks"): torch.ones(4, 32, 64)}), "twice"),
    ],
    ids=["no scales", "no blocks", "shape", "dtype", "infinite", "twice"],
)
def test_broken_checkpoints_are_named(published: Path, change: Any, what: str) -> None:
    with pytest.raises(ModelUnsupported, match=what):
        EngineDriver(changed(published, change))
