"""A model's sizes: those of the engine and of its packer."""

import json
from pathlib import Path

import pytest
import torch
from architectures import tiny_config
from fakes.models import make_adapter, make_tiny_model

from bench.gpu.sizes import SIZES, write_model
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
    moe = write_model(tmp_path / "moe", SIZES["tiny-moe"][0])
    with pytest.raises(ModelUnsupported, match="adapters on experts"):
        model_facts(moe, targets=("gate_up_proj",))
    with pytest.raises(ConfigError, match="--tp-size 4"):
        model_facts(moe, tp_size=4)
    tiny_config("olmoe", "OlmoeForCausalLM").save_pretrained(tmp_path / "tree")
    for ranks in (1, 2):
        with pytest.raises(ModelUnsupported, match="adapters on experts"):
            model_facts(str(tmp_path / "tree"), targets=("down_proj",), tp_size=ranks)


def test_of_experts_a_token_reads_and_computes_those_that_it_takes(tmp_path):
    dims = SIZES["tiny-moe"][0]
    facts = model_facts(write_model(tmp_path / "moe", dims))
    assert facts.expert_layers == dims.layers and facts.top_k == 2
    assert facts.expert_bytes == 2 * dims.experts * dims.expert_parameters
    taken = dims.parameters - (dims.experts - 2) * dims.expert_parameters
    assert facts.parameters == taken + dims.hidden * dims.vocab
    assert facts.experts_taken(1) == pytest.approx(2 / 6) and facts.experts_taken(64) == pytest.approx(1)
    routers = 8 * dims.layers * (dims.hidden + dims.experts) * 2
    assert facts.adapter_bytes(8) == dims.adapter_bytes(8) + routers  # and no experts


@pytest.mark.parametrize("ranks", [1, 2])
def test_of_a_mixture_through_transformers_a_token_takes_as_many(tmp_path, ranks):
    hf = tiny_config("olmoe", "OlmoeForCausalLM")
    hf.save_pretrained(tmp_path)
    facts = model_facts(str(tmp_path), dtype="bfloat16", tp_size=ranks)
    layers, experts, taken = hf.num_hidden_layers, hf.num_experts, hf.num_experts_per_tok
    assert (facts.expert_layers, facts.top_k) == (layers, taken) and 0 < taken < experts
    each = layers * 3 * hf.hidden_size * hf.intermediate_size
    assert facts.expert_bytes * ranks == 2 * experts * each
    assert facts.experts_taken(1) == pytest.approx(taken / experts)
    share = hf.num_key_value_heads / hf.num_attention_heads
    attention = int(layers * hf.hidden_size**2 * 2 * (1 + share))  # which ranks do not divide
    head = hf.vocab_size * hf.hidden_size
    assert facts.parameters == attention + (taken * each + head) // ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_in_8_bit_are_counted_with_their_scales(tmp_path, ranks):
    """A step reads half as much of them, and four bytes for each row."""
    dims = SIZES["tiny-moe"][0]
    path = write_model(tmp_path / "moe", dims)
    plain, held = (model_facts(path, tp_size=ranks, quantization=kind) for kind in (None, "fp8"))
    scales = 4 * dims.layers * sum(out for _, out in dims.expert_modules.values())
    assert held.expert_bytes * ranks == dims.experts * (dims.expert_parameters + scales)
    assert plain.expert_bytes * ranks == 2 * dims.experts * dims.expert_parameters
    model = make_model(path, dtype="bfloat16", device=torch.device("cpu"), quantization="fp8")
    assert ranks > 1 or held.weight_bytes == model.weight_bytes
    assert plain.weight_bytes - held.weight_bytes > plain.expert_bytes - held.expert_bytes > 0
    assert ranks > 1 or model_facts(path, quantization="bitsandbytes").expert_bytes == plain.expert_bytes


@pytest.mark.parametrize(("method", "ranks"), [("gptq", 1), ("gptq", 2), ("awq", 1), ("awq", 2)])
def test_experts_in_4_bit_are_counted_with_their_scales(tmp_path, method, ranks):
    """Four bytes for each row and group of inputs."""
    dims = SIZES["tiny-moe"][0]
    path = Path(write_model(tmp_path / "moe", dims))
    config = {"quant_method": method, "bits": 4, "group_size": 32}
    plain = model_facts(str(path), tp_size=ranks)
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | {"quantization_config": config}))
    held = model_facts(str(path), tp_size=ranks)
    assert held.expert_bytes * ranks == dims.experts * dims.expert_parameters * (1 / 2 + 4 / 32)
    assert plain.expert_bytes * ranks == 2 * dims.experts * dims.expert_parameters
    if ranks == 1:
        model = make_model(str(path), dtype="bfloat16", device=torch.device("cpu"))
        assert sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name) == held.expert_bytes
        assert plain.weight_bytes - held.weight_bytes > plain.expert_bytes - held.expert_bytes
    other = model_facts(str(path), tp_size=ranks, dtype="float16")
    assert other.expert_bytes == plain.expert_bytes


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_ranks_hold_their_parts(tmp_path, name):
    dims = SIZES[name][0]
    path = write_model(tmp_path / "model", dims)
    whole, half = model_facts(path), model_facts(path, tp_size=2)
    assert half.tp_size == 2 and half.layout.token_bytes == whole.layout.token_bytes // 2
    assert 0.5 <= half.weight_bytes / whole.weight_bytes < 0.55  # norms and routers are whole
    assert 0.5 <= half.parameters / whole.parameters < 0.55
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert model_facts(path, tp_size=2, targets=attention).adapter_bytes(8) == sum(
        2 * dims.layers * 8 * (a / 2 + b if module.endswith("o_proj") else a + b / 2)
        for module, (a, b) in dims.modules.items()
        if module.startswith("self_attn")
    )
