"""What is particular to mixtures of experts: layouts of their checkpoints, settings that no router can work with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakes.models import EXPERT_FAMILIES, TINY_SIZES, make_tiny_model
from loaded_model import loaded_model
from packed_integers import pack_gptq, rounded
from quantised import write_quantised
from safetensors.torch import load_file, save_file

from multilora.distributed.group import ProcessGroup
from multilora.errors import ConfigError, ModelUnsupported
from multilora.models.llama import LlamaForCausalLM
from multilora.models.load import make_model, read_config

META = torch.device("meta")
UP = "model.layers.1.mlp.experts.4.up_proj.weight"


def fuse(path: Path, family: str) -> None:
    """Write the same weights as transformers has them in memory."""
    model = make_tiny_model(path, family)
    model.save_pretrained(path, save_original_format=False)
    names = load_file(path / "model.safetensors")
    assert names["model.layers.1.mlp.experts.gate_up_proj"].ndim == 3


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_both_layouts_of_a_checkpoint_fill_the_same_weights(family: str, tmp_path: Path) -> None:
    single, fused = tmp_path / "single", tmp_path / "fused"
    make_tiny_model(single, family)
    assert any(".experts.4." in name for name in load_file(single / "model.safetensors"))
    fuse(fused, family)
    theirs = dict(loaded_model(single).named_parameters())
    ours = dict(loaded_model(fused).named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_transformers_stacks_them_alike(tmp_path: Path) -> None:
    reference = dict(make_tiny_model(tmp_path, "qwen3_moe").named_parameters())
    ours = dict(loaded_model(tmp_path).named_parameters())
    names = [name for name in reference if ".experts." in name]
    assert len(names) == 4
    assert all(torch.equal(ours[f"{name}.data"], reference[name].flatten(0, 1)) for name in names)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


def misshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = torch.zeros(48, 65)


def one_too_many(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP.replace(".4.", ".6.")] = torch.zeros(48, 64)


def twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(6, 64, 48)


def other_count(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.0.mlp.experts" in name]:
        del tensors[name]
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(5, 96, 64)
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(5, 64, 48)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, rf"lacks {UP}"),
        (misshape, rf"tensor {UP} has shape \[48, 65\], the config asks for \[48, 64\]"),
        (one_too_many, r"holds model\.layers\.1\.mlp\.experts\.6\.up_proj\.weight, which the model would not use"),
        (twice, r"holds model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight, .* and 3 more twice"),
        (other_count, r"experts\.\w+ has shape \[5, \d+, \d+\], the config asks for \[6, \d+, \d+\]"),
    ],
)
def test_experts_that_do_not_fit_are_named(
    edit: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    make_tiny_model(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelUnsupported, match=message):
        loaded_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok = 7 of num_experts = 6"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok = 0 of num_experts = 5"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
    ],
)
def test_settings_that_no_router_can_work_with(
    family: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    prefix, extra = EXPERT_FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**(TINY_SIZES | extra | overrides))
    config.architectures = [f"{prefix}ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match=rf"{prefix}ForCausalLM with {message} is not supported"):
        read_config(str(tmp_path), model_impl="native")


def test_ranks_divide_experts_evenly(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "qwen3_moe", num_experts=5)
    message = "--tp-size 2: experts.gate_up_proj: 5 experts cannot be divided into 2 equal parts"
    with pytest.raises(ConfigError, match=message):
        make_model(str(tmp_path), device=META, group=ProcessGroup(None, 0, 2, META))


def test_graphs_need_a_grouped_product(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "moe", "qwen3_moe")
    make_tiny_model(tmp_path / "dense", "qwen3")
    moe, dense = (make_model(str(tmp_path / name), device=META) for name in ("moe", "dense"))
    assert isinstance(moe, LlamaForCausalLM)
    assert (moe.capturable, dense.capturable) == (False, True)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_are_held_in_8_bit_and_routers_are_not(family: str, tmp_path: Path) -> None:
    """Of a base model that is quantised while it is loaded, by the modules that transformers has."""
    make_tiny_model(tmp_path, family)
    held = {}
    for impl in ("native", "transformers"):
        model = make_model(str(tmp_path), device=META, quantization="fp8", model_impl=impl)
        held[impl] = {name: param.dtype for name, param in model.named_parameters() if "layers.0." in name}
    wide = [name for name, dtype in held["native"].items() if dtype.itemsize > 1 and "scale" not in name]
    assert [name for name in wide if "proj" in name and not name.endswith(".bias")] == []
    assert held["native"]["model.layers.0.mlp.gate.weight.data"] == torch.float32
    assert held["native"].get("model.layers.0.mlp.shared_expert_gate.weight.data", torch.float32) == torch.float32
    theirs = {name: dtype for name, dtype in held["transformers"].items() if ".experts." in name}
    assert len(theirs) == 2 and set(theirs.values()) == {torch.float32}, (
        "through transformers they stay what they are"
    )


INTEGERS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
ROWS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": scheme}}


FLOATS = compressed("float-quantized", ROWS, TOKENS)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 40}, "awq inputs of 64: expected a multiple of 40"),
    "packed integers": (
        compressed("pack-quantized", INTEGERS | {"group_size": 40}, None),
        "packed inputs of 64: expected a multiple of 40",
    ),
    "some integers": (
        {"quant_method": "awq", "bits": 4, "group_size": 16, "modules_to_not_convert": ["experts.3.up_proj"]},
        "some experts in awq in 4 bit and plain are not supported; all in the same format are",
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "experts in bitsandbytes .*; in 16 bit, fp8 and packed integers of 4 or 8 bit they are",
    ),
    "static": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        "experts in fp8 by tensors, activations static are not supported; with activations dynamic they are",
    ),
    "inputs in 16 bit": (
        compressed("float-quantized", ROWS, None),
        "experts in fp8 by rows, activations none are not supported; with activations dynamic they are",
    ),
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "experts of 48 and 48 outputs in fp8 in blocks of 128 x 128, .*; of a multiple of 128 they are",
    ),
    "some": (
        {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp.experts.3.up_proj"]},
        "some experts in fp8 by tensors, activations dynamic and plain are not supported; all in the same format are",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_experts_in_other_formats_are_named_before_weights_are_read(name: str, tmp_path: Path) -> None:
    config, said = REFUSED[name]
    make_tiny_model(tmp_path, "qwen3_moe")
    (tmp_path / "model.safetensors").unlink()
    rewrite(tmp_path, config)
    with pytest.raises(ModelUnsupported, match=rf"model\.layers\.0\.mlp\.experts: {said}") as raised:
        make_model(str(tmp_path), device=META)
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    "config",
    [
        FLOATS,
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
    ],
)
def test_quantised_experts_of_transformers_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "qwen3_moe")
    rewrite(tmp_path, config)
    said = r"experts in (fp8|awq|gptq) .* are not supported through transformers' modules; in 16 bit they are"
    with pytest.raises(ModelUnsupported, match=said):
        make_model(str(tmp_path), device=META, model_impl="transformers")


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("2.up_proj.qzeros", None, r"lacks model\.layers\.1\.mlp\.experts\.2\.up_proj\.qzeros"),
        ("2.up_proj.qweight", torch.zeros(8, 48), r"up_proj\.qweight is F32, the config asks for I32"),
        (
            "2.up_proj.scales",
            torch.zeros(3, 48),
            r"up_proj\.scales has shape \[3, 48\], the config asks for \[2, 48\]",
        ),
        ("2.up_proj.bias", torch.ones(48), "bias is not zero, and the model has none"),
        (
            "6.up_proj.qweight",
            torch.zeros(8, 48, dtype=torch.int32),
            "6.up_proj.qweight, which the model would not use",
        ),
        (
            "2.up_proj.g_idx",
            torch.arange(64).flip(0).int() // 32,
            "g_idx: groups of different sizes, or in another order",
        ),
    ],
)
def test_packed_experts_that_lack_something_are_named(
    name: str, edit: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    def gptq(path: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return pack_gptq(rounded(weight, 4, 32, symmetric=True), 4)

    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    write_quantised(tmp_path, config, gptq, family="qwen3_moe", moe_intermediate_size=96 if "idx" in name else 48)
    tensors = load_file(tmp_path / "model.safetensors")
    if edit is None:
        del tensors[f"model.layers.1.mlp.experts.{name}"]
    else:
        tensors[f"model.layers.1.mlp.experts.{name}"] = edit
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelUnsupported, match=message):
        loaded_model(tmp_path, dtype="bfloat16")


def rewrite(path: Path, config: dict[str, Any]) -> None:
    """Say that the checkpoint is quantised so."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))


@pytest.mark.parametrize(
    ("left", "edit", "message"),
    [
        (
            "experts.2.up_proj.weight_scale",
            None,
            r"experts\.gate_up_proj: the checkpoint has no scale for its fp8 weight",
        ),
        ("experts.2.up_proj.weight", None, r"lacks model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight"),
        ("experts.2.up_proj.weight", torch.zeros(48, 64), r"up_proj\.weight is F32, the config asks for F8_E4M3"),
    ],
)
def test_quantised_experts_that_lack_something_are_named(
    left: str, edit: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    def by_tensor(path: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale": torch.tensor(1.0)}

    write_quantised(tmp_path, {"quant_method": "fp8"}, by_tensor, family="qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.{left}"]
    if edit is not None:
        tensors[f"model.layers.1.mlp.{left}"] = edit
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelUnsupported, match=message):
        loaded_model(tmp_path)
