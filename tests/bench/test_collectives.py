"""`python -m bench.collectives` with tiny sizes, on the CPU; and the bytes that a rank of `bench.gpu` must read."""

import pytest

from bench.collectives import ROWS, measure
from bench.gpu.sizes import SIZES


@pytest.mark.slow
def test_the_collectives_of_a_step_are_measured() -> None:
    found = measure("tiny", "cpu", 2)
    assert list(found) == [("gloo", rows) for rows in ROWS]
    assert all(ms > 0 and limit > 0 for ms, limit in found.values())


def test_what_a_rank_reads() -> None:
    dims, _ = SIZES["llama-8b"]
    whole, half = dims.step_bytes(64, 160, [16] * 64), dims.step_bytes(64, 160, [16] * 64, 2)
    assert dims.step_bytes(1, 0, [], 2) == dims.step_bytes(1, 0, []) / 2
    assert half > whole / 2, "one of A and B is whole on every rank"
    assert dims.adapter_bytes(16, 2) / dims.adapter_bytes(16) == pytest.approx(0.7, abs=0.1)
    assert dims.kv_bytes(16) == dims.kv_bytes(8) == dims.kv_bytes() / 8, "a KV head is not cut"
