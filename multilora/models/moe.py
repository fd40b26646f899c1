"""A mixture of experts in place of an MLP: a router, and the experts that it sends each token to.

Qwen3-MoE, Mixtral and Qwen2-MoE (their files say what differs). Numbers of rows depend on the number of tokens only
and the host is never asked, so that a CUDA graph can hold all of it where experts have a grouped product.
Ranks divide the experts; every one of them routes all tokens, by the same numbers.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from multilora.distributed.group import Group
from multilora.errors import ModelUnsupported
from multilora.layers.context import ForwardContext
from multilora.layers.experts import Experts, combine, route, sort_by_expert
from multilora.layers.linear import Linear
from multilora.layers.weights.plain import WeightFormats
from multilora.lora.sites import DeclaredModules, LoraSite, Shard, module_path, target
from multilora.models.config import MoeConfig
from multilora.models.mlp import MLP


class SparseMoe(nn.Module):
    """The weighted sum of a token's experts, and of the one that all tokens share, if there is one."""

    def __init__(
        self,
        config: MoeConfig,
        hidden: int,
        layer: int,
        declared: DeclaredModules,
        group: Group,
        *,
        weights: WeightFormats,
        **kind: Any,
    ):
        super().__init__()
        self._moe = config
        gate = target("mlp.gate", config.num_experts, before_kv=False, shard=Shard.REPLICATED)
        self.gate = Linear(declared.site(layer, "gate", hidden, gate), group=group, **kind)
        path = module_path(layer, "mlp", "experts")
        held = weights.of_experts(path, config.num_experts)
        try:
            self.experts = Experts(*_sites(config, hidden, layer, declared), group=group, weight_format=held, **kind)
        except ModelUnsupported as e:
            raise ModelUnsupported(f"{path}: {e.message}") from None
        self._held = self.experts.held if group.size > 1 else None
        self.shared_expert: MLP | None = None
        if config.shared_size:
            path, size = "mlp.shared_expert", config.shared_size
            self.shared_expert = MLP(
                path, hidden, size, layer, declared, group, prefix="shared_expert", weights=weights, **kind
            )
            own = target("mlp.shared_expert_gate", 1, before_kv=False, shard=Shard.REPLICATED)
            self.shared_expert_gate = Linear(declared.site(layer, "shared_expert_gate", hidden, own), **kind)

    def forward(self, x: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """x: [tokens, hidden]. Returns the same shape, this rank's share."""
        experts, weights = self._route(x, ctx)
        segments = ctx.lora.expert_segments() if ctx.lora is not None else None
        rows = sort_by_expert(experts, self._moe.num_experts, segments, self._held)
        if self._held is not None:
            weights = weights * ((experts >= self._held.start) & (experts < self._held.stop))
        y = combine(self.experts(x, rows, ctx), rows, weights)
        if self.shared_expert is not None:
            y += torch.sigmoid(self.shared_expert_gate(x, ctx)) * self.shared_expert(x, ctx)
        return y

    def _route(self, x: torch.Tensor, ctx: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Which experts each token takes, int64 [tokens, top_k], and their weights."""
        moe, dtype = self._moe, x.dtype if self._moe.rounded else torch.float32
        return route(self.gate(x, ctx), moe.top_k, normalised=moe.normalised, dtype=dtype)


def _sites(config: MoeConfig, hidden: int, layer: int, declared: DeclaredModules) -> tuple[LoraSite, LoraSite]:
    """gate and up of every expert, which PEFT sees as one parameter, and down."""
    inner, count = config.intermediate_size, config.num_experts
    both = partial(target, before_kv=False, shard=Shard.EXPERT, prefix="experts")
    gate_up = both("mlp.experts.gate_up_proj", 2 * inner, parts=("gate_proj", "up_proj"))
    down = both("mlp.experts.down_proj", hidden, parts=("down_proj",))
    return (
        declared.site(layer, "experts.gate_up_proj", hidden, gate_up, experts=count),
        declared.site(layer, "experts.down_proj", inner, down, experts=count),
    )


def check_experts(hf: Any) -> None:
    """Raise ModelUnsupported for numbers of experts that no router can work with. hf: transformers' config."""
    experts, taken = hf.num_experts, hf.num_experts_per_tok
    if not 1 <= taken <= experts:
        what = f"num_experts_per_tok = {taken} of num_experts = {experts}"
        raise ModelUnsupported(f"{hf.architectures[0]} with {what} is not supported")


def qwen_experts(hf: Any, shared_size: int = 0) -> MoeConfig:
    """The mixture of a Qwen2-MoE or Qwen3-MoE. Raises ModelUnsupported for numbers that no router can work with."""
    check_experts(hf)
    return MoeConfig(
        layers=sparse_layers(hf),
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        intermediate_size=hf.moe_intermediate_size,
        normalised=hf.norm_topk_prob,
        rounded=True,
        shared_size=shared_size,
    )


def sparse_layers(hf: Any) -> frozenset[int]:
    """The layers that have experts, by Qwen's rule. Raises ModelUnsupported for a step that is none."""
    step = hf.decoder_sparse_step
    if step < 1:
        raise ModelUnsupported(f"{hf.architectures[0]} with decoder_sparse_step = {step} is not supported")
    dense = set(hf.mlp_only_layers or ())
    return frozenset(i for i in range(hf.num_hidden_layers) if i not in dense and (i + 1) % step == 0)
