"""The classification head: the base model's, adapters' own of other sizes, and none at all."""

import torch

from multilora.batch import LoraSegment
from multilora.layers.context import ForwardContext
from multilora.layers.score import ScoreHead
from multilora.lora.full_weights import FullWeightModules
from multilora.lora.sites import MODEL_LEVEL, SCORE
from multilora.lora.table import FullWeight, Piece

HIDDEN = 6
WEIGHTS = {1: torch.randn(4, HIDDEN), 2: torch.randn(1, HIDDEN)}
"""By slot; slot 3 has no head."""


class Table:
    def full_weights(self, slot: int, layer: int, module: str) -> list[FullWeight]:
        assert (layer, module) == (MODEL_LEVEL, SCORE)
        if slot not in WEIGHTS:
            return []
        weight = WEIGHTS[slot]
        pieces = tuple(Piece(i, 0, weight[i : i + 1]) for i in range(len(weight)))  # as if each had its page
        return [FullWeight(len(weight), HIDDEN, pieces, None)]


def context() -> ForwardContext:
    segments = (LoraSegment(1, 2, (1,), (1.0,)), LoraSegment(2, 4, (2,), (1.0,)), LoraSegment(4, 5, (3,), (1.0,)))
    return ForwardContext(None, None, FullWeightModules(Table(), segments, 0))  # type: ignore[arg-type]


def made(labels: int) -> ScoreHead:
    head = ScoreHead(labels, HIDDEN, device=torch.device("cpu"), dtype=torch.float32)
    if head.weight is not None:
        head.weight.copy_(torch.randn(labels, HIDDEN))
    return head


def test_the_base_models_own() -> None:
    head, rows = made(3), torch.randn(5, HIDDEN)
    torch.testing.assert_close(head(rows, ForwardContext(None, None)), rows @ head.weight.T)  # type: ignore[arg-type]


def test_adapters_bring_their_own() -> None:
    head, rows = made(3), torch.randn(5, HIDDEN)
    found = head(rows, context())
    assert found.shape == (5, 4)
    for row, weight in enumerate((head.weight, WEIGHTS[1], WEIGHTS[2], WEIGHTS[2], head.weight)):
        assert weight is not None
        torch.testing.assert_close(found[row, : len(weight)], weight @ rows[row])
        assert found[row, len(weight) :].isneginf().all()


def test_without_a_head_of_the_base_models() -> None:
    head, rows = made(0), torch.randn(5, HIDDEN)
    assert list(head.parameters()) == []
    found = head(rows, context())
    torch.testing.assert_close(found[1], WEIGHTS[1] @ rows[1])
    assert found[0].isneginf().all()
    assert found[4].isneginf().all()
