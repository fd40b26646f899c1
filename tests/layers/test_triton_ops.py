"""The fused operations against the layers' own torch code: in Triton's interpreter, and on a GPU if there is one.

Covers `ops.py` too.
"""

import pytest
import torch

pytest.importorskip("triton")

from compilers import compile_elsewhere
from fakes.layer_context import BASE

from multilora.batch import ExpertRows
from multilora.layers import triton_ops as ops
from multilora.layers.activation import SiluAndMul
from multilora.layers.experts import combine
from multilora.layers.matmul import linear, logits
from multilora.layers.norm import NormForm, RMSNorm
from multilora.lora.sites import NormModule

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":  # the interpreter rounds bfloat16 towards zero
    DTYPES.append(torch.bfloat16)
ULP = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # sums run in another order


def make_norm(size: int, dtype: torch.dtype, form: NormForm = NormForm.ROUNDED) -> RMSNorm:
    norm = RMSNorm(NormModule(0, "norm", "", size, True), 1e-5, device=CPU, dtype=dtype, form=form)
    norm.weight.normal_(generator=torch.Generator().manual_seed(size))
    return norm


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "size", "form"),
    [*((5, 33, form) for form in NormForm), *((rows, size, NormForm.ROUNDED) for rows, size in ((1, 8), (2, 5120)))],
)
def test_norm(rows: int, size: int, form: NormForm, dtype: torch.dtype) -> None:
    norm, x = make_norm(size, dtype, form), random(rows, size, dtype=dtype) * 30
    got = ops.rms_norm(x.to(DEVICE), norm.weight.to(DEVICE), norm.eps, form)
    torch.testing.assert_close(got.cpu(), norm(x, BASE), atol=0, rtol=ULP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads_in_a_merged_tensor(dtype: torch.dtype) -> None:
    norm, qkv = make_norm(64, dtype), random(5, 8, 64, dtype=dtype)
    k = qkv[:, 3:6]
    got = ops.rms_norm(qkv.to(DEVICE)[:, 3:6], norm.weight.to(DEVICE), norm.eps, norm.form)
    assert got.is_contiguous()
    torch.testing.assert_close(got.cpu(), norm(k, BASE), atol=0, rtol=ULP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "size", "form"),
    [(1, 8, NormForm.ONE_PLUS), (7, 100, NormForm.ROUNDED), (7, 100, NormForm.ONE_PLUS), (2, 4096, NormForm.ROUNDED)],
)
def test_add_and_norm(rows: int, size: int, form: NormForm, dtype: torch.dtype) -> None:
    norm, x, residual = (
        make_norm(size, dtype, form),
        random(rows, size, dtype=dtype),
        random(size, rows, dtype=dtype).T,
    )
    residual = residual.contiguous()
    got, total = ops.add_rms_norm(x.to(DEVICE), residual.to(DEVICE), norm.weight.to(DEVICE), norm.eps, norm.form)
    want, want_total = norm.add(x, residual, BASE)
    assert torch.equal(total.cpu(), want_total)
    torch.testing.assert_close(got.cpu(), want, atol=0, rtol=ULP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 4), (3, 96), (2, 1027), (4, 2048)])
def test_silu_and_mul(tokens: int, width: int, dtype: torch.dtype) -> None:
    gate_up = random(tokens, 2 * width, dtype=dtype) * 4
    got = ops.silu_and_mul(gate_up.to(DEVICE))
    torch.testing.assert_close(got.cpu(), SiluAndMul()(gate_up), atol=1e-6, rtol=2 * ULP[dtype])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "size"), [(16, 256), (48, 768), (6, 4096), (4, 6144)])
def test_matvec(out: int, size: int, dtype: torch.dtype, bias: bool) -> None:
    x, weight = random(1, size, dtype=dtype), random(out, size, dtype=dtype)
    b = random(out, dtype=dtype) * 20 if bias else None
    assert ops.matvec_fits(weight)
    got = ops.matvec(x.to(DEVICE), weight.to(DEVICE), None if b is None else b.to(DEVICE), dtype)
    want = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), want, atol=1e-3, rtol=ULP[dtype])


def test_matvec_does_not_round_what_is_wanted_in_fp32() -> None:
    x, weight = random(1, 512, dtype=torch.float16), random(40, 512, dtype=torch.float16)
    got = ops.matvec(x.to(DEVICE), weight.to(DEVICE), None, torch.float32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), x.float() @ weight.float().T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("out", "size"), [(15, 256), (64, 96), (3, 2048), (2, 4097)])
def test_weights_that_matvec_does_not_take(out: int, size: int) -> None:
    assert not ops.matvec_fits(torch.empty(out, size))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layers_on_a_gpu_take_them() -> None:
    norm = RMSNorm(NormModule(0, "norm", "", 64, True), 1e-5, device=torch.device("cuda"), dtype=torch.bfloat16)
    norm.weight.fill_(1.5)
    x = random(3, 64, dtype=torch.bfloat16)
    on_cpu = RMSNorm(NormModule(0, "norm", "", 64, True), 1e-5, device=CPU, dtype=torch.bfloat16)
    on_cpu.weight.fill_(1.5)
    torch.testing.assert_close(norm(x.cuda(), BASE).cpu(), on_cpu(x, BASE), atol=0, rtol=8e-3)
    for got, want in zip(norm.add(x.cuda(), x.cuda(), BASE), on_cpu.add(x, x, BASE), strict=True):
        torch.testing.assert_close(got.cpu(), want, atol=0, rtol=8e-3)
    torch.testing.assert_close(SiluAndMul()(x.cuda()).cpu(), SiluAndMul()(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_linear_and_logits_on_a_gpu(rows: int) -> None:
    x, weight, bias = (random(*shape, dtype=torch.bfloat16) for shape in [(rows, 512), (96, 512), (96,)])
    exact = x.float() @ weight.float().T
    on_gpu = linear(x.cuda(), weight.cuda(), bias.cuda())
    torch.testing.assert_close(on_gpu.cpu().float(), exact + bias.float(), atol=1e-2, rtol=8e-3)
    torch.testing.assert_close(logits(x.cuda(), weight.cuda()).cpu(), exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "count", "size"), [(1, 1, 8), (5, 3, 33), (2, 8, 1030)])
def test_the_weighted_sum_of_experts(tokens: int, count: int, size: int, dtype: torch.dtype) -> None:
    y, weights = random(tokens * count, size, dtype=dtype), random(tokens, count, dtype=torch.float32)
    places = torch.randperm(tokens * count, generator=torch.Generator().manual_seed(3)).view(tokens, count)
    expected = combine(y, ExpertRows(places, places, places, places), weights)
    got = ops.combine_experts(y.to(DEVICE), places.to(DEVICE), weights.to(DEVICE))
    torch.testing.assert_close(got.cpu(), expected, atol=ULP[dtype], rtol=ULP[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_of_a_table_that_a_rank_holds(dtype: torch.dtype) -> None:
    table = random(40, 24, dtype=dtype)
    held, ids = range(32, 70), torch.tensor([32, 0, 69, 70, 31, 50])  # 40 rows, of which two are padding
    expected = torch.stack([table[i - 32] if i in held else torch.zeros(24, dtype=dtype) for i in ids.tolist()])
    assert torch.equal(ops.embed_part(ids.to(DEVICE), table.to(DEVICE), held).cpu(), expected)


@pytest.mark.slow
def test_embedding_compiles_for_gpus() -> None:
    assert len(compile_elsewhere("compile_small.py", "embed_part")) == 2
