"""Products with integers of 4 bits that stay packed, as torch's own kernels take them (`aten::_weight_int4pack_mm`).

W[o, i] = (q - 8) · scale + zero, where scale and zero belong to the output and the group of inputs: bf16
[groups, out, 2]. How q lies in memory is the kernel's business: `packed_like` allocates it, `pack` fills it. On CUDA
it is tiles of 8 outputs (`numbers_of`); on a CPU blocks of 64 outputs, which differ by processor.
"""

import functools

import torch

from multilora.layers.matmul import linear

aten = torch.ops.aten
GROUPS = (32, 64, 128, 256)
PRODUCT_ROWS = 56
"""Rows up to which the packed product is taken; for more the weight is dequantised first. On an H200 a layer of
Llama-3.1-8B's takes 0.016 ms a row packed and 0.91 ms dequantised (`python -m bench.int4_matmul`, 2026-11-30)."""

CAPABILITY = (8, 0)
OUTS = {"cpu": 64, "cuda": 8}
"""How many outputs are packed together."""


def obstacle(device: torch.device, dtype: torch.dtype, outs: int, width: int, group: int) -> str | None:
    """What keeps a matrix [outs, width] from staying packed; None: nothing does, as far as can be known where nothing
    is computed ("meta")."""
    if dtype != torch.bfloat16:
        return f"packed products are in bfloat16, the model is in {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return "packed products need a GPU of compute capability 8.0 or later"
    if group not in GROUPS:
        return f"packed products take groups of {', '.join(map(str, GROUPS))} inputs, it has {group}"
    if width % group or outs % outs_together(device):
        return f"{outs} outputs of {width} inputs are not whole tiles"
    return None if device.type == "meta" else disagreement(device)


CHECKED = ((256, 64), (192, 32), (96, 32))
"""Inputs and sizes of groups, one for each way of tiles to follow each other on CUDA."""


@functools.cache
def disagreement(device: torch.device) -> str | None:
    """What packing, torch's product and unpacking get wrong on this device, tried once with small matrices: how
    torch's kernel lays numbers out is no promise of torch's. None: they agree with the definition above."""
    g = torch.Generator().manual_seed(0)
    for width, group in CHECKED:
        numbers = torch.randint(0, 16, (64, width), dtype=torch.int32, generator=g)
        scales = (torch.rand(width // group, 64, 2, generator=g) + 0.5).bfloat16()
        wide = scales.float().repeat_interleave(group, dim=0)
        expected = ((numbers - 8) * wide[..., 0].T + wide[..., 1].T).to(device)
        given = pack(numbers.to(device).contiguous()), group, scales.to(device)
        multiplied = packed_product(torch.eye(width, dtype=torch.bfloat16, device=device), *given).T
        for what, found in (("product", multiplied), ("layout", dequantise(*given))):
            if not torch.allclose(found.float(), expected, atol=0.02, rtol=0.01):
                return f"torch {torch.__version__}'s {what} of packed numbers is not the one that is known here"
    return None


def outs_together(device: torch.device) -> int:
    """What a slice of outputs must be a multiple of to be packed by itself."""
    return OUTS["cpu" if device.type == "cpu" else "cuda"]


def inner(width: int) -> int:
    """How many tiles of 16 inputs follow each other for a lane, on CUDA: as many as the width allows."""
    return next(n for n in (8, 4, 2) if width % (16 * n) == 0)


def packed_like(outs: int, width: int, device: torch.device) -> torch.Tensor:
    """Memory for a packed matrix. Slices of its first dimension are slices of outputs."""
    if device.type == "cpu":
        return torch.empty(outs, width // 2, dtype=torch.uint8)
    each = inner(width)
    return torch.empty(outs // 8, width // (16 * each), 32, each // 2, dtype=torch.int32, device=device)


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """numbers: int32 [outs, width], 0 … 15, contiguous. Returns them packed."""
    if numbers.device.type == "cpu":
        packed: torch.Tensor = aten._convert_weight_to_int4pack_for_cpu(numbers, 1)  # noqa: SLF001
        return packed
    pairs = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8).contiguous()
    found: torch.Tensor = aten._convert_weight_to_int4pack(pairs, inner(numbers.shape[1]))  # noqa: SLF001
    return found


def product(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """x: bf16 [rows, width], contiguous; scales: bf16 [groups, outs, 2], scale and zero. Returns x Wᵀ."""
    if x.device.type == "cuda" and len(x) > PRODUCT_ROWS:
        return linear(x, dequantise(packed, group, scales))
    return packed_product(x, packed, group, scales)


def packed_product(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """The same, by torch's kernel for any number of rows."""
    on_cpu = x.device.type == "cpu"
    kernel = aten._weight_int4pack_mm_for_cpu if on_cpu else aten._weight_int4pack_mm  # noqa: SLF001
    y: torch.Tensor = kernel(x, packed, group, scales)
    return y


def dequantise(packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """W, bf16 [outs, width]."""
    groups, outs = scales.shape[:2]
    width = groups * group
    if packed.device.type == "cpu":
        one = torch.eye(width, dtype=scales.dtype)
        return packed_product(one, packed, group, scales).T.contiguous()
    from multilora.layers.triton_int4 import dequantise_into as fused

    out = torch.empty(outs, width, dtype=scales.dtype, device=packed.device)
    fused(out, packed, group, scales)
    return out


def dequantise_into(out: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> None:
    """W into `out`, [outs, width], from tiles as CUDA has them: what the kernel of the same name computes."""
    wide = scales.float().repeat_interleave(group, dim=0)  # [width, outs, 2]
    out.copy_((numbers_of(packed) - 8) * wide[..., 0].T + wide[..., 1].T)


def numbers_of(packed: torch.Tensor) -> torch.Tensor:
    """int32 [outs, width] from tiles as CUDA has them: int32 [outs / 8, width / (16 · inner), 32, inner / 2].

    A word has eight numbers of one output: pairs of neighbours (low half of the word, high half) at four places,
    which are two halves of each of two tiles of 16 inputs. Lane = 4 · output + pair.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    found = (packed[..., None] >> shifts) & 15  # [n, k, 32, words, 8]
    n, k, _, words, _ = found.shape
    parts = found.view(n, k, 8, 4, words, 2, 2, 2)  # n, k, output, pair, word, neighbour, tile, half
    return parts.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(n * 8, k * words * 32)
