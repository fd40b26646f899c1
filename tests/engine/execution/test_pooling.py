"""The pooler: chunks of several prompts side by side, over several steps."""

import pytest
import torch

from multilora.engine.execution.pooling import Pooler
from multilora.engine.plan import Chunk, PooledChunk
from multilora.params import PoolingMethod, PoolingParams


def chunk(slot: int, start: int, count: int, method: PoolingMethod | None, *, ends: bool = False) -> Chunk:
    pooling = None if method is None else PooledChunk(PoolingParams(method), ends)
    return Chunk(slot, start, count, list(range(count)), pooling=pooling)


def test_steps_of_mixed_chunks() -> None:
    rows = torch.arange(24.0).view(12, 2)
    pooler = Pooler()
    first = [chunk(0, 0, 3, "mean"), chunk(1, 0, 1, None), chunk(2, 0, 2, "cls"), chunk(3, 4, 2, "last", ends=True)]
    found = pooler.pool(first, rows[:8])
    assert found is not None
    torch.testing.assert_close(found, rows[7:8])
    second = [chunk(2, 2, 1, "cls", ends=True), chunk(4, 0, 1, "last", ends=True), chunk(0, 3, 2, "mean", ends=True)]
    found = pooler.pool(second, rows[8:])
    assert found is not None
    torch.testing.assert_close(found, torch.stack([rows[4], rows[9], torch.cat([rows[:3], rows[10:]]).mean(0)]))
    assert pooler.pool([chunk(5, 0, 2, "mean"), chunk(6, 0, 2, "last")], rows[:4]) is None


def test_results_outlive_the_rows() -> None:
    """Graphs write the next step's rows over these."""
    rows, pooler = torch.ones(4, 3), Pooler()
    found = pooler.pool([chunk(0, 0, 2, "last", ends=True), chunk(1, 0, 2, "cls")], rows)
    rows.zero_()
    later = pooler.pool([chunk(1, 2, 1, "cls", ends=True)], rows[:1])
    assert found is not None
    assert later is not None
    assert found.eq(1).all()
    assert later.eq(1).all()


def test_a_prompt_that_begins_anew() -> None:
    rows, pooler = torch.ones(4, 3), Pooler()
    pooler.pool([chunk(0, 0, 3, "mean")], rows[:3])
    found = pooler.pool([chunk(0, 0, 4, "mean", ends=True)], 2 * rows)
    assert found is not None
    assert found.eq(2).all()


def test_nothing_is_left_of_a_request() -> None:
    pooler = Pooler()
    pooler.pool([chunk(0, 0, 3, "mean")], torch.ones(3, 3))
    pooler.free(0)
    with pytest.raises(AssertionError, match="slot 0"):
        pooler.pool([chunk(0, 3, 1, "mean", ends=True)], torch.ones(1, 3))


def test_sums_are_fp32() -> None:
    rows = torch.full((3000, 1), 1.0, dtype=torch.bfloat16)
    found = Pooler().pool([chunk(0, 0, 3000, "mean", ends=True)], rows)
    assert found is not None
    assert found.dtype == torch.float32
    assert found.item() == 1.0
