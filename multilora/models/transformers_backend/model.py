"""A causal LM of transformers behind the contract of a model: its own tree, with our modules where they matter.

Replaced are the linear layers that read tokens, the embedding and the head; attention goes over pages. Norms, rotary
embeddings, activations, routers and experts stay transformers' own. Adapters attach by the names that PEFT has.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, GenerationConfig

from multilora.attention.base import AttentionShape
from multilora.distributed.group import SINGLE, Group
from multilora.errors import ConfigError
from multilora.layers.context import ForwardContext
from multilora.lora.sites import SCORE, LoraSlice, NormModule, module_path
from multilora.models.base import CausalLM
from multilora.models.config import ModelConfig
from multilora.models.transformers_backend.config import TreeConfig, tree_config
from multilora.models.transformers_backend.materialize import materialize
from multilora.models.transformers_backend.modules import (
    ATTENTION,
    PagedAttention,
    ReplacedNorm,
    TreeEmbedding,
    TreeHead,
    TreeLinear,
    TreeStep,
    attend,
)
from multilora.models.transformers_backend.rotary import hold_still
from multilora.models.transformers_backend.sites import Sites, declare
from multilora.models.transformers_backend.tree import Tree
from multilora.models.transformers_backend.weights import load_tree
from multilora.models.weights import fill_dummy


def embedding_scale(embedding: Any, dtype: torch.dtype) -> float | None:
    """What a token embedding of transformers multiplies its rows with, as it is rounded there; None: nothing."""
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return None if scale is None else float(torch.tensor(float(scale), dtype=dtype))


class TransformersCausalLM(CausalLM):
    """See `CausalLM`. Its parameters lie in `lm`, transformers' tree, under the names that they have there."""

    config: TreeConfig

    def __init__(self, config: TreeConfig, device: torch.device, group: Group = SINGLE):
        super().__init__(config, device, group)
        if group.size > 1 and config.division.obstacle:
            raise ConfigError(
                f"--tp-size {group.size}: {config.architecture} runs through transformers' modules, and "
                f"{config.division.obstacle}; --tp-size 1 serves it"
            )
        AttentionInterface.register(ATTENTION, attend)
        self._tree = tree = Tree(config.hf, config.architecture, config.dtype)
        tree.attend_by(ATTENTION)
        self._step = TreeStep()
        half = config.head_dim // 2
        self._turn = torch.ones(1, 1, half, device=device), torch.zeros(1, 1, half, device=device)
        self._sites = self._declare()
        for path, module in tree.lm.named_modules():
            if path.endswith(".experts") and next(module.parameters(recurse=False), None) is not None:
                config.weights.check_experts(path)
        for path, site in self._sites.linears.items():
            formats = (config.weights.choose(path),)
            linear = TreeLinear(site, self._step, group=group, device=device, dtype=config.dtype, formats=formats)
            tree.lm.set_submodule(path, linear)
        self._replace_tables(device)
        materialize(tree.lm, device)
        for module in tree.lm.modules():
            hold_still(module, config.context_length)
        self._attach()
        self.lm: nn.Module = tree.lm

    @classmethod
    def configure(
        cls, hf: Any, *, generation: GenerationConfig | None, context_length: int | None, dtype: torch.dtype
    ) -> ModelConfig:
        """See `CausalLM`."""
        return tree_config(hf, generation=generation, context_length=context_length, dtype=dtype)

    def without_adapters(self) -> tuple[str, ...]:
        """See `CausalLM`. Experts and routers, for the most part."""
        layers = self._sites.layers
        modules: list[tuple[int, NormModule | LoraSlice]] = [(norm.layer, norm) for norm in self.norms()]
        modules += [(site.layer, s) for site in self.lora_sites() for s in site.slices]
        declared = {module_path(layer, m.parent, m.attribute or m.module, layers) for layer, m in modules}
        paths = (name.rpartition(".")[0] for name, _ in self.lm.named_parameters())
        return tuple(dict.fromkeys(p for p in paths if not {p, p.removesuffix(".weight")} & declared))

    @property
    def attention_shape(self) -> AttentionShape:
        whole = self.config.attention
        if not self.config.division.heads:
            return whole
        return replace(whole, num_heads=whole.num_heads // self.group.size, num_kv_heads=self._kv_heads)

    @property
    def _kv_heads(self) -> int:
        return super()._kv_heads if self.config.division.heads else self.config.num_kv_heads

    def attention_path(self, layer: int) -> str:
        return self.config.examination.attentions[layer].path

    @property
    def layers_path(self) -> str:
        return self._sites.layers

    def embed(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        x: torch.Tensor = self.lm.get_submodule(self._tree.embedding_path)(ids, ctx)
        return x

    def forward(self, x: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        step, tokens = self._step, len(x)
        cos, sin = self._turn
        step.context, step.attended = ctx, 0
        step.rope = cos.expand(tokens, -1, -1).contiguous(), sin.expand(tokens, -1, -1).contiguous()
        return self._tree.hidden(x, positions)

    def logits(self, hidden_rows: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        self._step.context = ctx
        found = self._tree.logits(hidden_rows).float()
        if ctx.full_weights is not None and self._step.logits is not None:
            found.masked_fill_(self._step.logits.isneginf(), -torch.inf)  # whatever transformers makes of those
        return found

    def load(self, model_path: str, *, load_format: str, revision: str | None, seed: int) -> None:
        if load_format == "dummy":
            fill_dummy(self, seed, self.group.rank)
        else:
            load_tree(self._tree.lm, model_path, revision, self.kv_scales.destinations())

    def _declare(self) -> Sites:
        tree = self._tree
        embedding, head = (tree.lm.get_submodule(path) for path in (tree.embedding_path, tree.head_path))
        return declare(
            self.config.examination,
            self.declared,
            self.config.division,
            embedding=(tree.embedding_path, *embedding.weight.shape),
            head=(tree.head_path, head.in_features, head.out_features, head.bias is not None),
            has_head=self.config.generates,
        )

    def _replace_tables(self, device: torch.device) -> None:
        tree, sites = self._tree, self._sites
        kind: dict[str, Any] = {"device": device, "dtype": self.config.dtype, "group": self.group}
        own, own_head = (tree.lm.get_submodule(path) for path in (tree.embedding_path, tree.head_path))
        embedding = TreeEmbedding(sites.embedding, self._step, scale=embedding_scale(own, self.config.dtype), **kind)
        tree.lm.set_submodule(tree.embedding_path, embedding)
        if sites.head is None:
            tree.lm.set_submodule(tree.head_path, nn.Identity())
            if self.config.classifier is not None:
                tree.lm.add_module(SCORE, self.score)
            return
        head = TreeHead(
            sites.head, self._step, tied_to=embedding if self.config.tie_word_embeddings else None, **kind
        )
        tree.lm.set_submodule(tree.head_path, head)
        for module in tree.lm.modules() if own_head.bias is not None else ():
            for name, param in module._parameters.items():
                if param is own_head.bias:  # BERT's is its parent's too
                    module._parameters[name] = head.bias

    def _attach(self) -> None:
        """Give attention layers and norms what they need of a step."""
        found = self.config.examination
        attention = PagedAttention(self._step, self.config.head_dim, self.config.attention.scale)
        for path in {a.path for a in found.attentions}:
            self._tree.lm.get_submodule(path).paged_attention = attention
        for fact in found.norms:
            hook = ReplacedNorm(self._sites.norms[fact.path], fact.token_dim, self._step)
            self._tree.lm.get_submodule(fact.path).register_forward_hook(hook)
