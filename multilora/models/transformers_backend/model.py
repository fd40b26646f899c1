"""A causal LM of transformers behind the contract of a model: its own tree, with our modules where they matter.

Replaced are the linear layers that read tokens, the embedding and the head; attention goes over pages. Norms, gated
MLPs and rotations are ours where they compute the same (`common_parts.py`), and so are the products of experts
(`tree_experts.py`); the rest, routers above all, stays transformers' own. Adapters attach by the names that PEFT has.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, GenerationConfig

from multilora.attention.base import AttentionShape
from multilora.distributed.group import SINGLE, Group
from multilora.errors import ConfigError
from multilora.layers.context import ForwardContext
from multilora.layers.grouped_matmul import has_grouped_product
from multilora.layers.linear import Linear
from multilora.lora.sites import SCORE, LoraSlice, NormModule, module_path
from multilora.models.base import CausalLM
from multilora.models.config import ModelConfig
from multilora.models.transformers_backend.common_parts import gated_mlp, rms_norm_like, with_rotation
from multilora.models.transformers_backend.config import TreeConfig, tree_config
from multilora.models.transformers_backend.experts import mixtures, sum_over_ranks
from multilora.models.transformers_backend.materialize import materialize
from multilora.models.transformers_backend.modules import (
    ATTENTION,
    PagedAttention,
    ReplacedNorm,
    TreeEmbedding,
    TreeGateUp,
    TreeHead,
    TreeLinear,
    TreeNorm,
    TreeSiblings,
    TreeSlice,
    TreeStep,
    attend,
    rotation_left_to,
)
from multilora.models.transformers_backend.parameters import cut_parameters
from multilora.models.transformers_backend.rotary import hold_still
from multilora.models.transformers_backend.sites import JOINT, Sites, declare
from multilora.models.transformers_backend.tree import Tree
from multilora.models.transformers_backend.tree_experts import TreeExperts, fill_laid_out, gate_of, lay_by_outputs
from multilora.models.transformers_backend.weights import load_tree
from multilora.models.weights import Destination, fill_dummy

NORM_SHAPES = frozenset({(0, 2), (1, 3), (1, 4), (2, 4)})
"""What norms of ours take: which dimension counts the tokens, of how many."""


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
        kind: dict[str, Any] = {"device": device, "dtype": config.dtype}
        self._replace_linears(kind | {"group": group})
        self._replace_norms(kind)
        self._replace_tables(device)
        self._held = cut_parameters(tree.lm, config.division.parameters, group)
        shares = {path for path, _ in mixtures(tree.lm) if any(held.startswith(f"{path}.") for held in self._held)}
        self._replace_experts(shares)
        for path in shares:
            sum_over_ranks(tree.lm.get_submodule(path), path, group, device)
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
        """See `CausalLM`. Routers, for the most part."""
        layers = self._sites.layers
        modules: list[tuple[int, NormModule | LoraSlice]] = [(norm.layer, norm) for norm in self.norms()]
        modules += [(site.layer, s) for site in self.lora_sites() for s in site.slices]
        declared = {module_path(layer, m.parent, m.attribute or m.module, layers) for layer, m in modules}
        ours = {path for path, m in self.lm.named_modules() if isinstance(m, Linear)} | set(self._sites.experts)
        paths = (name.rpartition(".")[0] for name, _ in self.lm.named_parameters())
        return tuple(dict.fromkeys(p for p in paths if not {p, p.removesuffix(".weight")} & (declared | ours)))

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

    @property
    def capturable(self) -> bool:
        """See `CausalLM`. Experts that are transformers' own go by torch's grouped product, where that is chosen."""
        ours = {fact.path for fact in self.config.examination.experts}
        for path, mixture in mixtures(self.lm):
            config: Any = mixture.config
            widths = [n for p in mixture.parameters(recurse=False) if p.dim() == 3 for n in p.shape[1:]]
            grouped = has_grouped_product(self.device, self.config.dtype, *widths)
            if not grouped or (path not in ours and config._experts_implementation != "grouped_mm"):
                return False
        return True

    @property
    def attends_one_by_one(self) -> bool:
        paths = [a.path for a in self.config.examination.attentions]
        return len(set(paths)) == len(paths)

    def embed(self, ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        x: torch.Tensor = self.lm.get_submodule(self._tree.embedding_path)(ids, ctx)
        return x

    def forward(self, x: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        cos, sin = (part.expand(len(x), -1, -1).contiguous() for part in self._turn)
        self._step.begin(ctx, (cos, sin))
        return self._tree.hidden(x, positions)

    def logits(self, hidden_rows: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        self._step.context = ctx
        found = self._tree.logits(hidden_rows).float()
        if ctx.full_weights is not None and self._step.logits is not None:
            found.masked_fill_(self._step.logits.isneginf(), -torch.inf)  # whatever transformers makes of those
        return found

    def load(self, model_path: str, *, load_format: str, revision: str | None, seed: int) -> None:
        if load_format == "dummy":
            fill_dummy(self, seed, self.group.rank, {self.lm.get_parameter(path) for path in self._held})
            return
        held = {
            path: Destination(p.shape, partial(fill_laid_out, self.lm.get_parameter(path)), p.part)
            for path, p in self._held.items()
        }
        load_tree(self._tree.lm, model_path, revision, held | self.kv_scales.destinations())

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

    def _replace_linears(self, kind: dict[str, Any]) -> None:
        """Put ours in the places of linear layers, several that read the same tensor as one."""
        lm, step = self._tree.lm, self._step
        mlps = self._gated_mlps()
        for paths, site in self._sites.linears.items():
            made = kind | {"formats": [self.config.weights.choose(path) for path in paths]}
            if len(paths) == 1:
                lm.set_submodule(paths[0], TreeLinear(site, step, **made))
                continue
            parent, names = paths[0].rpartition(".")[0], [path.rpartition(".")[2] for path in paths]
            module = lm.get_submodule(parent)
            gate, up, down = mlps.get(parent, ("", "", ""))
            if names == [gate, up]:
                gate_up = TreeGateUp(site, step, **made)
                module.add_module(JOINT.join(names), gate_up)
                module.forward = gate_up.mlp_forward(module, down)
                for name in names:
                    delattr(module, name)
                continue
            siblings = TreeSiblings(site, step, **made)
            module.add_module(JOINT.join(names), siblings)
            for number, name in enumerate(names):
                setattr(module, name, TreeSlice(siblings, number))

    def _gated_mlps(self) -> dict[str, tuple[str, str, str]]:
        """The names of gate, up and down, by the path of their module, where it does nothing else."""
        parents = {path.rpartition(".")[0] for paths in self._sites.linears if len(paths) == 2 for path in paths}
        found = {p: gated_mlp(self._tree.lm.get_submodule(p), self.config.dtype) for p in parents}
        return {parent: names for parent, names in found.items() if names is not None}

    def _replace_norms(self, kind: dict[str, Any]) -> None:
        """Put ours in the places of norms that compute the same, and let the others know of adapters' weights."""
        for fact in self.config.examination.norms:
            own, norm = self._tree.lm.get_submodule(fact.path), self._sites.norms[fact.path]
            fits = (fact.token_dim, fact.dims) in NORM_SHAPES and own.weight.dtype == self.config.dtype
            alike = rms_norm_like(own, self.config.dtype) if fits else None
            if alike is not None:
                eps, form = alike
                ours = TreeNorm(norm, fact.token_dim, self._step, eps, form=form, **kind)
                self._tree.lm.set_submodule(fact.path, ours)
            else:
                own.register_forward_hook(ReplacedNorm(norm, fact.token_dim, self._step))

    def _replace_experts(self, shares: Collection[str]) -> None:
        """Have experts that compute what ours do go by our products. shares: the paths of those of which this rank
        computes a share."""
        for fact in self.config.examination.experts:
            module: Any = self._tree.lm.get_submodule(fact.path)
            lay_by_outputs(module)
            gate, sites = gate_of(module, silu=fact.silu), self._sites.experts.get(fact.path, {})
            adds_bias = fact.path not in shares or self.group.rank == 0
            module.forward = TreeExperts(module, sites, self._step, gate, adds_bias=adds_bias).forward

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
        """Give attention layers what they need of a step."""
        calls, width = self.config.examination.attentions, self.config.head_dim
        attention = PagedAttention(self._step, width, self.config.attention.scale)
        for path in {a.path for a in calls}:
            layer = self._tree.lm.get_submodule(path)
            layer.paged_attention = attention
            if all(a.rotated for a in calls if a.path == path):
                layer.forward = with_rotation(layer, rotation_left_to(self._step, width))
