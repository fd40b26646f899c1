"""A model's sizes: those of the engine and of its packer."""

from pathlib import Path

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model

from multilora.adapter_tools.inspect import inspect
from multilora.errors import ConfigError, ModelUnsupported
from multilora.models.load import make_model
from multilora.planner.facts import model_facts

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts")
    make_tiny_model(path / "model")
    make_adapter(path / "all", path / "model", r=12, target_modules=MODULES)
    make_adapter(path / "two", path / "model", r=8, target_modules=["q_proj", "down_proj"])
    return path


@pytest.mark.parametrize(("name", "rank", "targets"), [("all", 12, None), ("two", 8, ("q_proj", "down_proj"))])
def test_adapters_are_as_large_as_the_loader_packs_them(path, name, rank, targets):
    facts = model_facts(str(path / "model"), targets=targets)
    served = inspect(str(path / name), str(path / "model"), dtype="bfloat16").served
    assert served is not None and served.page_bytes == facts.layout.page_bytes
    assert served.pages == facts.adapter_pages(rank)
    report = inspect(str(path / name))
    assert facts.adapter_bytes(rank) == 2 * report.parameters


def test_weights(path):
    facts = model_facts(str(path / "model"))
    model = make_model(str(path / "model"), dtype="bfloat16", device=torch.device("cpu"))
    assert facts.model.config.dtype == torch.bfloat16  # the checkpoint's float32 is not what a GPU serves
    assert facts.weight_bytes == model.weight_bytes
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert facts.parameters == sum(p.numel() for p in matrices)
    assert facts.weight_bytes - facts.read_bytes in (0, 2 * model.config.vocab_size * model.config.hidden_size)
    assert model_facts(str(path / "model"), dtype="float32").weight_bytes == 2 * facts.weight_bytes


def test_refusals(path, tmp_path):
    with pytest.raises(ConfigError, match="no module 'c_attn'; it has"):
        model_facts(str(path / "model"), targets=("c_attn",))
    with pytest.raises(ConfigError, match="no such directory"):
        model_facts("/nowhere")
    from bench.gpu.sizes import SIZES, write_model

    with pytest.raises(ModelUnsupported, match="mixture of experts"):
        model_facts(write_model(tmp_path / "moe", SIZES["tiny-moe"][0]))
