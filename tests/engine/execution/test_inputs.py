"""From plans to tensors: pages travel as changes, some tokens are known to the device alone."""

import random

import pytest
import torch

from multilora.batch import ForwardBatch, LoraSegment
from multilora.engine.execution.inputs import Newest, PageTables, build_inputs, logit_segments, lora_segments
from multilora.engine.plan import Chunk, PageUpdate, PromptLogprobs, StepPlan

PAGE = 4
NOTHING = Newest({}, torch.empty(0, dtype=torch.int64))


def chunk(count: int, *adapters: tuple[int, float], pre_activation: int = 0) -> Chunk:
    """adapters: (place, weight)."""
    slots, weights = tuple(slot for slot, _ in adapters), tuple(weight for _, weight in adapters)
    return Chunk(0, 0, count, [1] * count, slots, weights, pre_activation)


A, B = (4, 1.0), (2, 0.5)


@pytest.mark.parametrize(
    ("chunks", "segments"),
    [
        ([chunk(3)], []),
        ([chunk(3), chunk(2, A)], [(3, 5, (A,))]),
        ([chunk(3, A), chunk(2, A)], [(0, 5, (A,))]),
        ([chunk(3, A), chunk(2, B)], [(0, 3, (A,)), (3, 5, (B,))]),
        ([chunk(3, B, A), chunk(2, B, A)], [(0, 5, (B, A))]),
        ([chunk(1, A), chunk(1, (4, 0.5))], [(0, 1, (A,)), (1, 2, ((4, 0.5),))]),  # other weights, other rows
        ([chunk(5, A, pre_activation=2)], [(2, 5, (A,))]),
        ([chunk(5, A, pre_activation=5)], []),
        ([chunk(5, A, pre_activation=2), chunk(1, A)], [(2, 6, (A,))]),
        ([chunk(1, A), chunk(5, A, pre_activation=2)], [(0, 1, (A,)), (3, 6, (A,))]),
        ([chunk(2, A, pre_activation=2), chunk(3), chunk(2, A)], [(5, 7, (A,))]),
    ],
)
def test_lora_segments(chunks, segments):
    found = lora_segments(chunks)
    assert [(s.start, s.end, tuple(zip(s.slots, s.weights, strict=True))) for s in found] == segments


def test_logit_rows_keep_their_segments():
    segments = (
        LoraSegment(0, 4, (0,), (1.0,)),
        LoraSegment(4, 6, (1,), (1.0,)),
        LoraSegment(8, 10, (2, 3), (0.5, 2.0)),
    )
    rows = [2, 3, 6, 9]
    assert logit_segments(segments, rows) == (
        LoraSegment(0, 2, (0,), (1.0,)),
        LoraSegment(3, 4, (2, 3), (0.5, 2.0)),
    )


def build(tables: PageTables, chunks: list[Chunk], newest: Newest = NOTHING) -> ForwardBatch:
    return build_inputs(StepPlan(1, chunks), tables, newest, torch.device("cpu"))


def test_a_mixed_step():
    """A piece of a prompt with two prompt logprobs, the end of another prompt, a decode whose token is unknown."""
    tables = PageTables(PAGE)
    tables.update([PageUpdate(3, 0, [9, 8, 7]), PageUpdate(0, 0, [5]), PageUpdate(7, 0, [1, 2])])
    chunks = [
        Chunk(3, 6, 4, [60, 61, 62, 63], prompt_logprobs=PromptLogprobs(7, [62, 63], 1)),
        Chunk(0, 0, 3, [30, 31, 32], (4,), (1.0,), answer_positions=(0,)),
        Chunk(7, 5, 1, [], (2,), (0.5,), answer_positions=(2,), decodes=True),
    ]
    batch = build(tables, chunks, Newest({1: 0, 7: 2}, torch.tensor([70, 71, 72])))
    assert batch.input_ids.tolist() == [60, 61, 62, 63, 30, 31, 32, 72]
    assert batch.positions.tolist() == [6, 7, 8, 9, 0, 1, 2, 5]
    meta = batch.attention
    assert (meta.q_lens, meta.kv_lens) == ((4, 3, 1), (10, 3, 6))
    assert meta.page_table.tolist() == [[9, 8, 7], [5, 0, 0], [1, 2, 0]]
    assert meta.token_page.tolist() == [8, 8, 7, 7, 5, 5, 5, 2]
    assert meta.token_slot.tolist() == [2, 3, 0, 1, 0, 1, 2, 1]
    assert batch.logit_rows.tolist() == [1, 2, 6, 7]
    assert batch.lora == (LoraSegment(4, 7, (4,), (1.0,)), LoraSegment(7, 8, (2,), (0.5,)))
    assert batch.logit_lora == (LoraSegment(2, 3, (4,), (1.0,)), LoraSegment(3, 4, (2,), (0.5,)))


def test_several_positions_of_a_chunk_can_be_sampled():
    tables = PageTables(PAGE)
    tables.update([PageUpdate(0, 0, [5, 6])])
    batch = build(tables, [Chunk(0, 2, 4, [1, 2, 3, 4], answer_positions=(0, 1, 2))])
    assert batch.logit_rows.tolist() == [1, 2, 3]


def test_where_all_rows_are_wanted_segments_stay_as_they_are():
    tables = PageTables(PAGE)
    tables.update([PageUpdate(slot, 0, [slot]) for slot in range(3)])
    chunks = [Chunk(slot, 1, 1, [5], (slot,), (1.0,), answer_positions=(1,)) for slot in range(3)]
    batch = build(tables, chunks)
    assert batch.logit_lora == batch.lora == tuple(LoraSegment(i, i + 1, (i,), (1.0,)) for i in range(3))


def test_page_tables_follow_their_updates():
    """Against plain lists: longer and shorter tables, slots and widths beyond what there was, places taken back."""
    rng = random.Random(0)
    tables, known = PageTables(PAGE), {}
    for step in range(300):
        slot = rng.randrange(40)
        pages = known.setdefault(slot, [])
        first = rng.randrange(len(pages) + 1)
        new = [rng.randrange(1, 1000) for _ in range(rng.randrange(1, 12))]
        known[slot] = pages[:first] + new
        tables.update([PageUpdate(slot, first, new)])
        if step % 10 == 0:
            slots = rng.sample(sorted(known), min(5, len(known)))
            chunks = [Chunk(s, len(known[s]) * PAGE - 1, 1, [1], answer_positions=(1,)) for s in slots]
            meta = build(tables, chunks).attention
            width = max(len(known[s]) for s in slots)
            assert meta.page_table.tolist() == [known[s] + [0] * (width - len(known[s])) for s in slots]
            assert meta.token_page.tolist() == [known[s][-1] for s in slots]
