"""Weights in 4 bit by bitsandbytes: what they hold, and what in a checkpoint is said to be wrong."""

import importlib.util
import json
from typing import Any

import pytest
import torch

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.weights.base import Share
from multilora.layers.weights.methods import weight_formats

CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_threshold": 6.0,
}
OUTS, WIDTH = 40, 96
SHARE = Share(OUTS, WIDTH, range(OUTS), range(WIDTH))
KIND = {"device": torch.device("cpu"), "dtype": torch.float32}
ALL = slice(None)
installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def formats(**changes: Any) -> Any:
    return weight_formats({"quantization_config": CONFIG | changes}, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_in_8bit": True}, "load_in_8bit = True is not supported"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type = 'int4' is not supported; served: 'fp4', 'nf4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage = 'bfloat16' is not supported"),
        ({"something": 1}, "something = 1 is not supported"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelUnsupported, match=said):
        formats(**changes)


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multilora.layers.weights.bitsandbytes.importlib.util.find_spec", lambda name: None)
    for raw, asked in (({"quantization_config": CONFIG}, None), ({}, "bitsandbytes")):
        with pytest.raises(ConfigError, match=r"pip install 'multilora\[bnb\]'"):
            weight_formats(raw, asked)


@installed
def test_names() -> None:
    assert formats().name == "bitsandbytes nf4, double quantisation"
    assert formats(quant_method=None).name == formats().name, "older configs do not say the method"
    assert formats(bnb_4bit_use_double_quant=False, bnb_4bit_quant_type="fp4").name == "bitsandbytes fp4"
    assert not formats().choose("model.layers.0.mlp.up_proj").merges([64, 64])


@installed
@pytest.mark.parametrize("nested", [True, False])
def test_what_the_package_has_quantised_is_read_back(nested: bool) -> None:
    """Half the bytes of 8 bit, and what the numbers are scaled with."""
    from bitsandbytes import functional

    w = torch.randn(OUTS, WIDTH, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    weight = formats(bnb_4bit_use_double_quant=nested).choose("x").make(OUTS, WIDTH, **KIND)
    with pytest.raises(ModelUnsupported, match=r"lacks weight\.absmax"):
        weight.check_filled()
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    stored = weight.tensors(ALL, SHARE)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].shape in (None, tuple(tensor.shape)), name
        weight.load(ALL, name, tensor)
    weight.check_filled()
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(weight.dequantised(ALL), expected)
    assert torch.equal(weight.dequantised(slice(3, 9)), expected[3:9])
    x, bias = torch.randn(5, WIDTH), torch.randn(OUTS)
    torch.testing.assert_close(weight.matmul(x, bias), x @ expected.T + bias)
    blocks = OUTS * WIDTH // 64
    scales = blocks + 4 * -(-blocks // 256) + 4 * 256 + 4 if nested else 4 * blocks
    assert sum(p.numel() * p.element_size() for p in weight.parameters()) == OUTS * WIDTH // 2 + 4 * 16 + scales
    again = formats(bnb_4bit_use_double_quant=nested).choose("x").make(OUTS, WIDTH, **KIND)
    again.load(ALL, "weight", w)
    assert torch.equal(again.dequantised(ALL), expected), "the same, quantised while it is loaded"


@installed
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(range(8, 24), range(192)), (range(40), range(64, 192))], ids=str)
def test_a_rank_holds_its_part_of_the_whole(nested: bool, outputs: range, inputs: range) -> None:
    """The same numbers, whether the checkpoint has them or they are quantised while they are loaded."""
    from bitsandbytes import functional

    width = 192
    w = torch.randn(OUTS, width, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    expected = functional.dequantize_4bit(packed, state)[outputs.start : outputs.stop, inputs.start : inputs.stop]
    kind = formats(bnb_4bit_use_double_quant=nested).choose("x").of_ranks()
    tensors = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    for given in (tensors, {"weight": w}, dict(reversed(tensors.items()))):
        weight = kind.make(len(outputs), len(inputs), **KIND)
        stored = weight.tensors(ALL, Share(OUTS, width, outputs, inputs))
        assert stored.keys() == tensors.keys() and not any(one.part for one in stored.values())
        for name, tensor in given.items():
            with pytest.raises(ModelUnsupported, match=r"lacks weight\.absmax"):
                weight.check_filled()
            weight.load(ALL, name, tensor)
        weight.check_filled()
        assert torch.equal(weight.dequantised(ALL), expected)
        assert len(list(weight.parameters())) == 3, "nothing of the whole is left"
    weight = kind.make(OUTS, 96, **KIND)
    with pytest.raises(ConfigError, match="inputs 96 to 192 of 192 of a rank are not whole blocks of 64"):
        weight.tensors(ALL, Share(OUTS, width, range(OUTS), range(96, 192)))


@installed
def test_what_does_not_fit_is_said() -> None:
    weight = formats().choose("x").make(OUTS, WIDTH, **KIND)
    name = "weight.quant_state.bitsandbytes__nf4"
    said = {"quant_type": "nf4", "blocksize": 128, "shape": [OUTS, WIDTH], "nested_blocksize": 256}
    with pytest.raises(ModelUnsupported, match="blocksize is 128, expected 64"):
        weight.load(ALL, name, torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8))
    with pytest.raises(ModelUnsupported, match="weight holds 7 bytes, the config asks for 1920"):
        weight.load(ALL, "weight", torch.zeros(7, dtype=torch.uint8))
    with pytest.raises(ModelUnsupported, match=r"weight has shape \[3, 4\], the config asks for \[40, 96\]"):
        weight.load(ALL, "weight", torch.zeros(3, 4))
