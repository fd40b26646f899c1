"""RMSNorm is transformers' RMSNorm, bit for bit where torch computes it (`test_cpp_ops.py`: where C++ does)."""

import pytest
import torch
from fakes.layer_context import BASE
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from multilora.layers.norm import NormForm, RMSNorm, rms_norm
from multilora.lora.sites import NormModule


@pytest.mark.parametrize(
    ("form", "family"),
    [(NormForm.ROUNDED, LlamaRMSNorm), (NormForm.WIDE, Olmo2RMSNorm), (NormForm.ONE_PLUS, Gemma2RMSNorm)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_transformers(dtype: torch.dtype, form: NormForm, family: type[nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = family(33, 1e-5).to(dtype)
    theirs.weight.data.normal_(generator=generator)
    x = torch.randn(5, 3, 33, generator=generator).to(dtype) * 30
    assert torch.equal(rms_norm(x, theirs.weight, 1e-5, form), theirs(x))


def test_add_returns_the_sum_and_its_norm() -> None:
    norm = RMSNorm(NormModule(0, "norm", "", 8, True), 1e-5, device=torch.device("cpu"), dtype=torch.float32)
    norm.weight.fill_(2.0)
    x, residual = torch.randn(2, 4, 8).unbind()
    y, total = norm.add(x, residual, BASE)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm(x + residual, BASE))
    y, total = norm.add(x, None, BASE)
    assert torch.equal(total, x)
    assert torch.equal(y, norm(x, BASE))
