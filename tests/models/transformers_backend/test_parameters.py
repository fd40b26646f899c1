"""Parameters that ranks divide: which part each rank holds, and that it reads nothing else of a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config, tiny_model
from counted_file import Counted
from safetensors import safe_open
from torch import nn

from multilora.errors import ConfigError, ModelUnsupported
from multilora.models import weights
from multilora.models.base import CausalLM
from multilora.models.load import make_model
from multilora.models.transformers_backend import weights as tree_weights
from multilora.models.transformers_backend.parameters import ParameterCut, cut_parameters
from multilora.models.weights import take

EXPERTS = "lm.model.layers.1.mlp.experts"


class Rank:
    """One of two ranks, which asks nothing of the other while it loads."""

    exchange = None

    def __init__(self, rank: int, size: int = 2):
        self.rank = rank
        self.size = size


def made(path: Path, rank: int, size: int = 2) -> CausalLM:
    return make_model(str(path), device=torch.device("cpu"), group=Rank(rank, size))  # type: ignore[arg-type]


def loaded(path: Path, rank: int, load_format: str = "auto") -> CausalLM:
    model = made(path, rank)
    model.load(str(path), load_format=load_format, revision=None, seed=0)
    return model


def write(path: Path, architecture: str, model_type: str, **fields: Any) -> Any:
    """A tiny model in `path`."""
    config = tiny_config(model_type, architecture)
    for name, value in fields.items():
        setattr(config, name, value)
    model = tiny_model(architecture, config)
    model.save_pretrained(path)
    return model


def test_blocks_lie_behind_each_other() -> None:
    weight = torch.arange(2 * 12 * 3).view(2, 12, 3)
    gate, up = weight.chunk(2, dim=1)
    cut = ParameterCut(-2, blocks=2)
    for rank in range(3):
        rows = slice(2 * rank, 2 * rank + 2)
        found = take(weight, cut.part((2, 12, 3), rank, 3))
        assert torch.equal(found, torch.cat([gate[:, rows], up[:, rows]], dim=1))
        assert tuple(found.shape) == cut.held_shape((2, 12, 3), 3)


def test_units_stay_together() -> None:
    assert ParameterCut(-1, unit=3).part((12,), 1, 2) == (range(6, 12),)
    with pytest.raises(ValueError, match="4 cannot be divided into 3"):
        ParameterCut(-1, unit=3).part((12,), 0, 3)
    for cut in (ParameterCut(-1, unit=5), ParameterCut(-1, blocks=2)):
        with pytest.raises(ValueError, match="33 is not"):
            cut.part((33,), 0, 2)


def test_parameters_are_replaced_by_their_parts() -> None:
    with torch.device("meta"):
        lm = nn.Sequential(nn.Linear(8, 4, bias=False, dtype=torch.float16))
    found = cut_parameters(lm, {"0.weight": ParameterCut(-1)}, Rank(1, 4))  # type: ignore[arg-type]
    weight = lm.get_parameter("0.weight")
    assert weight.is_meta and tuple(weight.shape) == (4, 2) and weight.dtype == torch.float16
    assert found["0.weight"].shape == (4, 8) and found["0.weight"].part == (range(4), range(2, 4))
    assert cut_parameters(lm, {"0.weight": ParameterCut(-1)}, Rank(0, 1)) == {}  # type: ignore[arg-type]


def test_a_width_that_does_not_divide_is_named(tmp_path: Path) -> None:
    write(tmp_path, "OlmoeForCausalLM", "olmoe", intermediate_size=33)
    said = r"--tp-size 2: model\.layers\.0\.mlp\.experts\.gate_up_proj: its width 33 cannot be divided into 2 equal"
    with pytest.raises(ConfigError, match=said):
        made(tmp_path, 0)


@pytest.mark.parametrize(
    ("architecture", "model_type", "layer"),
    [
        ("DeepseekV3ForCausalLM", "deepseek_v3", "model.layers.1.mlp.experts"),  # three matrices for each expert
        ("AriaTextForCausalLM", "aria_text", "model.layers.1.mlp.experts"),  # two for all, as [in, out]
        ("GraniteMoeForCausalLM", "granitemoe", "model.layers.1.block_sparse_moe.experts"),  # two, under other names
        ("GptOssForCausalLM", "gpt_oss", "model.layers.1.mlp.experts"),  # as [in, out], gate and up in turns, biases
    ],
)
def test_a_rank_reads_its_part_of_the_experts(
    architecture: str, model_type: str, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = write(tmp_path, architecture, model_type)
    read: dict[str, int] = {}

    def opened(file: Path) -> Counted:
        return Counted(safe_open(file, framework="pt", device="cpu"), read)

    for module in (weights, tree_weights):
        monkeypatch.setattr(module, "open_file", opened)
    held = []
    for rank in range(2):
        read.clear()
        model = loaded(tmp_path, rank)
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        assert sum(read.values()) <= model.weight_bytes + buffers, "the rest is padding of the vocabulary"
        held.append(dict(model.named_parameters()))
    for name, param in reference.get_submodule(layer).named_parameters():
        parts = [of_rank[f"lm.{layer}.{name}"] for of_rank in held]
        dim = next((d for d in range(param.dim()) if parts[0].shape[d] < param.shape[d]), None)
        if dim is None:
            assert name == "down_proj_bias" and all(torch.equal(part, param) for part in parts)
            continue
        if name == "gate_up_proj" and model_type != "gpt_oss":
            parts = [torch.cat(halves, dim) for halves in zip(*(p.chunk(2, dim) for p in parts), strict=True)]
        assert torch.equal(torch.cat(parts, dim), param), name


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    write(tmp_path, "OlmoeForCausalLM", "olmoe")
    config = tiny_config("olmoe", "OlmoeForCausalLM")
    config.intermediate_size = 32
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match=r"experts\.0\.\w+\.weight has shape \[.*96.*\], the config asks for"):
        loaded(tmp_path, 0)


def test_dummy_experts_are_of_the_rank_and_routers_of_all(tmp_path: Path) -> None:
    write(tmp_path, "DeepseekV3ForCausalLM", "deepseek_v3")
    first, second = (dict(loaded(tmp_path, rank, "dummy").named_parameters()) for rank in range(2))
    gate = "lm.model.layers.1.mlp.gate.weight"
    assert torch.equal(first[gate], second[gate])
    assert not torch.equal(first[f"{EXPERTS}.down_proj"], second[f"{EXPERTS}.down_proj"])
