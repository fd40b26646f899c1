"""Rotary rotation of queries and keys in plain torch: the specification of the fused kernel.

It knows neither positions nor frequencies, only the angles' cos and sin (RoPE: Su et al. 2021, arXiv:2104.09864).
Called by `torch_sdpa.py`.
"""

import torch

CosSin = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of the angles at the tokens' positions, each fp32 [tokens, 1, head_dim / 2]."""


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle. x: [tokens, heads, head_dim]."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
