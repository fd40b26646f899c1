"""Runs a model step by step over a small arena whose pages are handed out in a scrambled order."""

from dataclasses import dataclass, field, replace

import torch

from multilora.attention.backends import make_attention
from multilora.batch import AttentionMeta, ColumnPages
from multilora.layers.context import ForwardContext
from multilora.models.base import CausalLM

PAGE = 4


@dataclass
class Sequence:
    """A text, and how much of it lies in which pages: for each block, its page in each column."""

    tokens: list[int]
    pages: list[list[int]] = field(default_factory=list)
    done: int = 0


class Driver:
    """One model and its arena. What pages held before must not matter: they begin as NaN."""

    def __init__(self, model: CausalLM, attention: str = "torch", num_pages: int = 64):
        layout = model.kv_layout(PAGE)
        arena = torch.zeros(num_pages, layout.page_bytes, dtype=torch.uint8, device=model.device)
        views = layout.views(arena)
        for k, v in views:  # whatever was there before must not matter
            k.fill_(torch.nan)
            v.fill_(torch.nan)
        self.model = model
        self.columns = layout.columns
        self.free = [(7 * i + 3) % num_pages for i in range(num_pages)]
        shape = replace(model.attention_shape, layer_columns=layout.layer_columns)
        self.attention = make_attention(attention, views, shape)

    @torch.inference_mode()
    def step(self, work: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
        """Compute the next n tokens of each sequence; returns their logits, [n, vocab] each."""
        ids, positions, blocks, slots = [], [], [], []
        for seq, n in work:
            while len(seq.pages) * PAGE < seq.done + n:
                seq.pages.append([self.free.pop() for _ in range(self.columns)])
            span = range(seq.done, seq.done + n)
            ids += seq.tokens[seq.done : seq.done + n]
            positions += list(span)
            blocks += [seq.pages[p // PAGE] for p in span]
            slots += [p % PAGE for p in span]
            seq.done += n
        width = max(len(seq.pages) for seq, _ in work)
        table = [seq.pages + [[0] * self.columns] * (width - len(seq.pages)) for seq, _ in work]
        lens = [n for _, n in work]
        device = self.model.device
        tensors = [torch.tensor(values, device=device) for values in (table, blocks, slots, ids, positions)]
        first, *further = [
            ColumnPages(tensors[0][..., c].contiguous(), tensors[1][..., c].contiguous()) for c in range(self.columns)
        ]
        meta = AttentionMeta(
            tuple(lens),
            tuple(seq.done for seq, _ in work),
            first.page_table,
            first.token_page,
            tensors[2],
            tuple(further),
        )
        self.attention.prepare(meta)
        context = ForwardContext(self.attention, None)
        hidden = self.model(self.model.embed(tensors[3], context), tensors[4], context)
        return list(self.model.logits(hidden, context).split(lens))
