"""The plain data that a forward pass works on. It is built anew for each step and never patched.

Rows are tokens. Requests lie one after the other, ordered so that rows of the same adapter are neighbours.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Rows [start, end) and the adapters that act on them; a row belongs to at most one segment.

    slots: indices into the LoRA table, one per adapter (several when adapters are composed); weights: one fp32 factor
    per slot.
    """

    start: int
    end: int
    slots: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """The rows of a step as the experts of a mixture take them: each token has one for each expert that it takes.

    They are sorted by expert, and within an expert by the segment of adapters that they belong to. tokens: int64
    [rows], whose row it is; experts: int64 [rows]; ends: int32 [experts], the row after each expert's last; places:
    int64 [tokens, top_k], the row of a token's k-th expert; segments: int64 [rows], from 1 on, 0: no adapter; None:
    no row of the step has one.
    """

    tokens: torch.Tensor
    experts: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor
    segments: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ColumnPages:
    """`page_table` and `token_page` of `AttentionMeta`, of another column."""

    page_table: torch.Tensor
    token_page: torch.Tensor


@dataclass(frozen=True, slots=True)
class SharedPages:
    """Requests of a step, by their numbers, that have the pages [first, first + blocks) of their tables in common.

    a  | p0 p1 p2 p3 | a4 a5         requests a, b, c: first 0, 4 blocks
    b  | p0 p1 p2 p3 | q4 q5 | b6    requests b, c: first 4, 2 blocks
    c  | p0 p1 p2 p3 | q4 q5 | c6
    """

    requests: tuple[int, ...]
    first: int
    blocks: int


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """Which tokens attend to what. There are R requests and T tokens; the tokens of request r follow those of
    request r - 1.

    Where layers see differently far, a block of tokens has several pages (`memory/kv_layout.py`), each in a column of
    its own: page_table and token_page are those of column 0, `further` of the others. What is behind a window is -1.

    shared: pages that requests with one new token each have in common, where a backend may profit from it; those of
    one request follow each other from its first page on.
    """

    q_lens: tuple[int, ...]  # [R] new tokens of each request in this step, each ≥ 1
    kv_lens: tuple[int, ...]  # [R] tokens of each request once this step has run (cached + new)
    page_table: torch.Tensor  # int64 [R, max pages], arena page ids; unused entries are 0
    token_page: torch.Tensor  # int64 [T], arena page that each new token's k and v go to
    token_slot: torch.Tensor  # int64 [T], token index inside that page
    further: tuple[ColumnPages, ...] = ()
    shared: tuple[SharedPages, ...] = ()

    def column(self, number: int) -> ColumnPages:
        return self.further[number - 1] if number else ColumnPages(self.page_table, self.token_page)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The input of one step. `lora` is empty when no row has an adapter."""

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    attention: AttentionMeta
    lora: tuple[LoraSegment, ...]
    logit_rows: torch.Tensor  # int64 [rows], the T rows whose logits are wanted, ascending
    logit_lora: tuple[LoraSegment, ...] = ()  # `lora`, counted in logit rows
