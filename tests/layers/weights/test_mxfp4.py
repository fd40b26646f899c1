"""Numbers of 4 bits with a common exponent, against a second writing of their definition, and transformers'."""

import pytest
import torch
from transformers.integrations import mxfp4 as theirs

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.weights import mxfp4
from multilora.layers.weights.methods import weight_formats
from multilora.layers.weights.plain import PLAIN


def number(code: int) -> float:
    """e2m1: a sign, two bits of exponent, one of mantissa; without an exponent the mantissa counts halves."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def test_every_byte_and_exponent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mxfp4, "CHUNK_BYTES", 80)  # several chunks, the last one shorter
    blocks = torch.arange(256, dtype=torch.uint8).view(4, 4, 16)
    scales = torch.arange(119, 135, dtype=torch.uint8).view(4, 4)
    found = mxfp4.dequantised(blocks, scales)
    assert found.shape == (4, 128) and found.dtype == torch.bfloat16
    expected = [
        number(code) * 2.0 ** (int(scales.flatten()[byte // 16]) - 127)
        for byte in range(256)
        for code in (byte & 15, byte >> 4)
    ]
    assert found.flatten().tolist() == expected


def test_as_transformers_has_it() -> None:
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=g)
    scales = torch.randint(90, 150, (2, 6, 3), dtype=torch.uint8, generator=g)
    expected = theirs._convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(mxfp4.dequantised(blocks, scales).transpose(1, 2), expected)


@pytest.mark.parametrize(
    ("dtype", "least", "largest"), [(torch.bfloat16, 0, 252), (torch.float32, 0, 252), (torch.float16, 104, 140)]
)
def test_the_least_and_the_largest_exponents(dtype: torch.dtype, least: int, largest: int) -> None:
    """What is beyond the range of the dtype is refused, not infinite."""
    blocks = torch.full((2, 1, 16), 0x17, dtype=torch.uint8)  # 6 and 0.5
    found = mxfp4.dequantised(blocks, torch.tensor([[least], [largest]], dtype=torch.uint8), dtype)
    assert found.dtype == dtype
    assert found[:, :2].tolist() == [[v * 2.0 ** (e - 127) for v in (6, 0.5)] for e in (least, largest)]
    for more in (largest + 1, 255):
        with pytest.raises(ValueError, match=f"not finite in {str(dtype).removeprefix('torch.')}"):
            mxfp4.dequantised(blocks, torch.tensor([[least], [more]], dtype=torch.uint8), dtype)


def test_formats_and_refusals() -> None:
    raw = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    formats = weight_formats(raw, None)
    assert formats.choose("model.layers.0.mlp.experts.0.up_proj") is PLAIN and "mxfp4" in formats.name
    with pytest.raises(ConfigError, match="reads such checkpoints and makes none"):
        weight_formats({}, "mxfp4")
    with pytest.raises(ModelUnsupported, match="group_size"):
        weight_formats({"quantization_config": {"quant_method": "mxfp4", "group_size": 16}}, None)
