"""Integers packed in words: every layout gives back the matrix that went into it, and says what it cannot hold.

Covers `weights/unpacked.py`, `weights/integers.py`, `weights/integer_format.py`, `weights/gptq.py`, `weights/awq.py`,
`weights/compressed_tensors.py` too. The layouts are written by the tests' own support file, and by the package
compressed-tensors where it is installed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import packed_integers
import pytest
import torch
from packed_integers import Integers, pack_awq, pack_compressed, pack_gptq

from multilora.errors import ConfigError, ModelUnsupported
from multilora.layers.weights.awq import Awq
from multilora.layers.weights.base import Share
from multilora.layers.weights.compressed_tensors import PackedIntegers
from multilora.layers.weights.gptq import Gptq
from multilora.layers.weights.integer_format import IntegerFormat
from multilora.layers.weights.methods import weight_formats
from multilora.layers.weights.plain import PLAIN

KIND = {"device": torch.device("cpu"), "dtype": torch.float32}
OUTS, WIDTH = 24, 64
Pack = Callable[[Integers], dict[str, torch.Tensor]]


def integers(bits: int, size: int, *, symmetric: bool = False, order: bool = False) -> Integers:
    weight = torch.randn(OUTS, WIDTH, generator=torch.Generator().manual_seed(bits))
    shuffled = np.random.default_rng(bits).permutation(WIDTH) if order else None
    return packed_integers.rounded(weight, bits, size, symmetric=symmetric, order=shuffled)


LAYOUTS: dict[str, tuple[IntegerFormat, Integers, Pack]] = {
    "gptq": (Gptq(4, 16, 1), integers(4, 16), lambda i: pack_gptq(i, 4)),
    "gptq, symmetric": (Gptq(4, 32, 1), integers(4, 32, symmetric=True), lambda i: pack_gptq(i, 4)),
    "gptq v2, any order": (
        Gptq(4, 16, 0, ordered=False),
        integers(4, 16, order=True),
        lambda i: pack_gptq(i, 4, older=False),
    ),
    "gptq in 8 bit, one group": (Gptq(8, None, 1), integers(8, WIDTH), lambda i: pack_gptq(i, 8)),
    "awq": (Awq(16), integers(4, 16), pack_awq),
    "awq, one group": (Awq(None), integers(4, WIDTH), pack_awq),
    "compressed": (
        PackedIntegers(4, 32, symmetric=True, ordered=True),
        integers(4, 32, symmetric=True),
        lambda i: pack_compressed(i, 4, symmetric=True, in_order=True),
    ),
    "compressed in 8 bit, not symmetric": (
        PackedIntegers(8, None, symmetric=False, ordered=True),
        integers(8, WIDTH),
        lambda i: pack_compressed(i, 8, symmetric=False, in_order=True),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_comes_out_as_it_went_in(layout: str) -> None:
    """Below another one, whose rows stay what they are; tensors come in any order."""
    kind, ints, pack = LAYOUTS[layout]
    weight = kind.make(8 + OUTS, WIDTH, **KIND)
    weight.randomise(torch.Generator().manual_seed(0))
    before, rows = weight.dequantised(slice(8)).clone(), slice(8, 8 + OUTS)
    tensors = pack(ints)
    stored = weight.tensors(rows, Share.whole(OUTS, WIDTH))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: s.shape for name, s in stored.items() if not s.optional
    }
    for name in sorted(tensors, reverse=layout.startswith("gptq")):
        weight.load(rows, name, tensors[name].contiguous())
    assert torch.equal(weight.dequantised(rows), ints.weight)
    assert torch.equal(weight.dequantised(slice(8)), before)


SHARES = [(range(8, 16), range(WIDTH)), (range(16, 24), range(32, 64)), (range(OUTS), range(24, 56))]
"""Some outputs; whole groups of inputs; parts of groups, which no rank could hold packed."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("outputs", "inputs"), SHARES, ids=str)
def test_a_share_is_that_part_of_the_matrix(layout: str, outputs: range, inputs: range) -> None:
    kind, ints, pack = LAYOUTS[layout]
    if kind.any_order and len(inputs) < WIDTH:
        assert kind.unshared_inputs is not None
        return
    weight = kind.make(len(outputs), len(inputs), **KIND)
    share, tensors = Share(OUTS, WIDTH, outputs, inputs), pack(ints)
    for name, stored in weight.tensors(slice(None), share).items():
        if not stored.optional:
            assert stored.shape == tuple(tensors[name].shape)
            held = tensors[name][tuple(slice(part.start, part.stop) for part in stored.part)]
            weight.load(slice(None), name, held.contiguous())
    want = ints.weight[outputs.start : outputs.stop, inputs.start : inputs.stop]
    assert torch.equal(weight.dequantised(slice(None)), want)


def test_ranks_hold_whole_words() -> None:
    for kind in (Gptq(4, 16, 1), PackedIntegers(4, 16, symmetric=True, ordered=True)):
        with pytest.raises(ConfigError, match="inputs 4 to 36 of a rank are not whole words of 8"):
            kind.stored(Share(OUTS, WIDTH, range(OUTS), range(4, 36)))
    with pytest.raises(ConfigError, match="awq outputs 0 to 12 of a rank are not whole words of 8"):
        Awq(16).stored(Share(OUTS, WIDTH, range(12), range(WIDTH)))


def test_a_zero_point_of_zero_wraps_in_the_older_format() -> None:
    ints = Integers(np.full((8, 8), 5), np.zeros((8, 1), dtype=int), torch.ones(8, 1).half(), np.zeros(8, dtype=int))
    tensors = pack_gptq(ints, 4)
    assert tensors["qzeros"].tolist() == [[-1]], "fifteen in every place"
    found = Gptq(4, None, 1).integers(tensors, Share.whole(8, 8))
    assert torch.equal(found.dequantised(), torch.full((8, 8), 5.0))


def test_what_layouts_cannot_hold_is_said() -> None:
    kind = Gptq(4, 16, 1)
    with pytest.raises(ModelUnsupported, match="gptq outputs of 20: expected a multiple of 8"):
        kind.stored(Share.whole(20, 64))
    with pytest.raises(ModelUnsupported, match="awq inputs of 40: expected a multiple of 16"):
        Awq(16).stored(Share.whole(8, 40))
    weight = kind.make(8, 16, **KIND)
    weight.load(slice(None), "bias", torch.zeros(8))
    with pytest.raises(ModelUnsupported, match="bias is not zero, and the model has none"):
        weight.load(slice(None), "bias", torch.ones(8))
    tensors = pack_gptq(LAYOUTS["gptq"][1], 4)
    with pytest.raises(ModelUnsupported, match="g_idx names group 9 of 4"):
        kind.integers(tensors | {"g_idx": torch.full((WIDTH,), 9)}, Share.whole(OUTS, WIDTH))
    part, ordered = Share(OUTS, WIDTH, range(OUTS), range(32, 64)), torch.arange(WIDTH).flip(0) // 16
    held = {
        name: tensors[name][tuple(slice(p.start, p.stop) for p in stored.part)]
        for name, stored in kind.stored(part).items()
        if name in tensors
    }
    with pytest.raises(ModelUnsupported, match="g_idx names group 0 of 4, where a rank's inputs have groups 2 to 3"):
        kind.integers(held | {"g_idx": ordered[32:]}, part)
    packed = LAYOUTS["compressed"]
    with pytest.raises(ModelUnsupported, match=r"weight_shape: \[24, 32\], expected \[24, 64\]"):
        packed[0].integers(packed[2](packed[1]) | {"weight_shape": torch.tensor([24, 32])}, Share.whole(OUTS, WIDTH))


FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "damp_percent": 0.1}


def compressed(weights: dict[str, Any], inputs: Any = None, layout: str = "pack-quantized", **more: Any) -> Any:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": scheme}} | more


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPTQ, "gptq in 4 bit"),
        (GPTQ | {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}, "gptq in 8 bit"),
        (AWQ, "awq in 4 bit"),
        (compressed(INT4), "compressed-tensors in 4 bit"),
        (compressed(FLOAT, {**FLOAT, "dynamic": True}, "float-quantized"), "fp8 by rows, activations dynamic"),
        (
            compressed(FLOAT | {"strategy": "block", "block_structure": [64, 64]}, None, "float-quantized"),
            "fp8 in blocks of 64 x 64, activations none",
        ),
    ],
)
def test_configs_that_are_served(config: dict[str, Any], name: str) -> None:
    assert weight_formats({"quantization_config": config}, None).name == name


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPTQ | {"bits": 3}, "bits = 3 is not supported; served: 4, 8"),
        (GPTQ | {"lm_head": True}, "lm_head = True is not supported"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' is not supported"),
        (GPTQ | {"dynamic": {"+:q_proj": {}}}, "dynamic = .* is not supported"),
        (GPTQ | {"group_size": 0}, "group_size = 0: expected a number of inputs, or -1"),
        (AWQ | {"version": "gemv"}, "version = 'gemv' is not supported; served: 'gemm'"),
        (AWQ | {"zero_point": False}, "zero_point = False is not supported"),
        (compressed(INT4, {**FLOAT, "dynamic": True}), "4-bit int weights and 8-bit float activations"),
        (compressed(FLOAT, None, "nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' with 8-bit float"),
        (compressed(FLOAT, INT4, "float-quantized"), "4-bit int activations of fp8 weights"),
        (compressed(INT4, sparsity_config={"format": "sparse-24-bitmask"}), "format = 'sparse-24-bitmask'"),
        ({"quant_method": "compressed-tensors"}, "config_groups = None: expected an object"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelUnsupported, match=said):
        weight_formats({"quantization_config": config}, None)


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_none_of_them_is_made_here(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--quantization {name}: this server reads such checkpoints and makes none"
    ):
        weight_formats({}, name)


def test_which_modules_are_quantised() -> None:
    up, q = "model.layers.3.mlp.up_proj", "model.layers.3.self_attn.q_proj"
    inside = weight_formats({"quantization_config": GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj"]]}}, None)
    assert inside.choose(up) is not PLAIN and inside.choose(q) is PLAIN
    skipped = weight_formats({"quantization_config": AWQ | {"modules_to_not_convert": ["up_proj"]}}, None)
    assert skipped.choose(up) is PLAIN and skipped.choose(q) is not PLAIN
    config = compressed(INT4, ignore=["re:.*self_attn.*", "lm_head"])
    config["config_groups"]["group_1"] = {"targets": ["re:.*up_proj"], "weights": INT4 | {"group_size": 64}}
    several = weight_formats({"quantization_config": config}, None)
    assert several.choose(q) is PLAIN
    assert [several.choose(path).group for path in (up, up.replace("up", "down"))] == [64, 128]


def test_as_the_package_compressed_tensors_packs() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    ints = integers(4, 32)
    args = quantization.QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    state = {
        "weight": ints.weight,
        "weight_scale": ints.scales.float(),
        "weight_zero_point": torch.from_numpy(ints.zeros - 8).to(torch.int8),
    }
    packed = PackedQuantizationCompressor.compress(state, scheme)
    packed["weight_shape"] = torch.tensor(packed["weight_shape"].tolist())
    kind = PackedIntegers(4, 32, symmetric=False, ordered=True)
    found = kind.integers(packed, Share.whole(OUTS, WIDTH))
    torch.testing.assert_close(found.dequantised(), ints.weight)
