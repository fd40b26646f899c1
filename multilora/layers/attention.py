"""Self-attention of one decoder layer: merged qkv, optional head norms, the backend, output projection.

Rotation, pages, masks and windows are the attention backend's business (`ctx.attention`).
"""

import torch
from torch import nn

from multilora.attention.rotate import CosSin
from multilora.layers.context import ForwardContext
from multilora.layers.linear import Linear
from multilora.layers.norm import RMSNorm


class SelfAttention(nn.Module):
    """Grouped-query attention. `q_norm` and `k_norm` act per head, before rotary (Qwen3)."""

    def __init__(
        self,
        layer: int,
        head_dim: int,
        qkv_proj: Linear,
        o_proj: Linear,
        *,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ):
        super().__init__()
        self.layer = layer
        self.heads = [s.out_features // head_dim for s in qkv_proj.site.slices]  # of q, k and v
        self.head_dim = head_dim
        self.qkv_proj = qkv_proj
        self.o_proj = o_proj
        self.q_norm = q_norm
        self.k_norm = k_norm

    def forward(self, x: torch.Tensor, rope: CosSin, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, hidden]; rope: cos and sin of the tokens' positions. Returns [tokens, hidden]."""
        tokens = x.shape[0]
        qkv = self.qkv_proj(x, ctx).view(tokens, -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=1)  # [tokens, heads or kv_heads, head_dim]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, ctx), self.k_norm(k, ctx)
        out = ctx.attention.forward(self.layer, q, k, v, rope)
        y: torch.Tensor = self.o_proj(out.reshape(tokens, -1), ctx)
        return y
