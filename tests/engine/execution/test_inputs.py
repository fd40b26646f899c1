"""Which rows of a step belong to which adapters."""

import pytest

from multilora.batch import LoraSegment
from multilora.engine.execution.inputs import logit_segments, lora_segments
from multilora.engine.messages import Submit
from multilora.engine.plan import Chunk, StepPlan
from multilora.engine.scheduling.request import Request
from multilora.params import SamplingParams

REQUEST = Request.of(
    Submit(rid="r", input_ids=[1], sampling=SamplingParams()), None, seed=0, order=1, arrival=0.0
)  # nobody looks at it


def chunk(count: int, *adapters: tuple[int, float], pre_activation: int = 0) -> Chunk:
    """adapters: (place, weight)."""
    return Chunk(
        REQUEST,
        0,
        0,
        count,
        False,
        True,
        0,
        slots=tuple(slot for slot, _ in adapters),
        weights=tuple(weight for _, weight in adapters),
        pre_activation=pre_activation,
        logprob_positions=range(0),
    )


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
    found = lora_segments(StepPlan(1, tuple(chunks)))
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
