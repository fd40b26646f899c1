import numpy as np

from multilora.engine.sampling.batch import Column, Kind, SlotTable
from multilora.engine.sampling.state import SamplingState
from multilora.engine.sampling.uniform import mixed_seed, uniforms
from multilora.params import SamplingParams


def table_of(**slots: dict) -> SlotTable:
    """s3={...}: the parameters of slot 3."""
    table = SlotTable()
    for name, fields in slots.items():
        top_logprobs = fields.pop("top_logprobs", -1)
        slot = int(name[1:])
        state = SamplingState(
            slot=slot, params=SamplingParams(**fields), seed=slot, vocab_size=9, top_logprobs=top_logprobs
        )
        table.set(state, 0, 0, (0, 0))
    return table


def batch(table: SlotTable, slots: list[int], position: int = 0):
    return table.batch(np.array(slots, dtype=np.int32), np.full(len(slots), position, dtype=np.int32))


def test_kinds_and_what_a_step_needs():
    table = table_of(
        s0={"temperature": 0.0}, s1={"top_k": 1}, s2={}, s3={"min_p": 0.5}, s4={"top_k": 5}, s9={"top_p": 0.5}
    )
    kinds = batch(table, [0, 1, 2, 3, 4, 9]).numbers[Column.KIND].tolist()
    assert kinds == [Kind.GREEDY] * 2 + [Kind.PLAIN] * 2 + [Kind.TRUNCATED] * 2
    assert batch(table, [0, 1]).all_greedy
    assert not batch(table, [0, 2]).all_greedy
    assert not batch(table, [2, 3]).truncates
    assert batch(table, [2, 9]).truncates
    assert not batch(table, [0, 2, 9]).edits


def test_numbers_lie_as_the_device_reads_them():
    """One line per column, whatever the order of the slots: what is uploaded has no gaps."""
    table = table_of(**{f"s{i}": {"temperature": 1.0 + i} for i in range(5)})
    some = batch(table, [4, 0, 2], position=7)
    assert some.numbers.flags.c_contiguous
    assert some.numbers[Column.TEMPERATURE].tolist() == [5.0, 1.0, 3.0]
    streams = np.array([mixed_seed(s) for s in (4, 0, 2)])
    assert some.numbers[Column.UNIFORM].tolist() == uniforms(streams, np.full(3, 7, dtype=np.int32)).tolist()


def test_rows_that_want_logprobs_are_listed():
    table = table_of(s0={}, s1={"top_logprobs": 0}, s2={"top_logprobs": 5})
    some = batch(table, [2, 0, 1])
    assert some.asked.tolist() == [0, 2]
    assert some.numbers[Column.ASKED].tolist() == [0, 2, 0]
    assert some.top_logprobs.tolist() == [5, -1, 0]


def test_a_cleared_slot_keeps_nothing():
    table = table_of(s1={"top_p": 0.5, "repetition_penalty": 1.5, "top_logprobs": 3})
    table.clear(1)
    some = batch(table, [1])
    assert some.all_greedy
    assert not some.edits
    assert len(some.asked) == 0
    empty = batch(table_of(s8={}), [5])  # never used
    assert empty.numbers[: Column.UNIFORM].tolist() == some.numbers[: Column.UNIFORM].tolist()
