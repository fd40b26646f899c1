"""Which graph a step takes and what is put in place before it is launched; the captures themselves need a GPU."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from multilora.batch import AttentionMeta, ForwardBatch, LoraSegment, SharedPages
from multilora.engine.execution.cuda_graphs import CudaGraphs, _Captured, _Cut, decode_sizes, piece_sizes

WIDTH = 3


@dataclass
class FakeAttention:
    """A twin or the attention between pieces. prepared: numbers of requests; attended: layers."""

    prepared: list[int] = field(default_factory=list)
    attended: list[int] = field(default_factory=list)

    def prepare(self, meta: AttentionMeta) -> None:
        self.prepared.append(len(meta.q_lens))

    def attend(self, layer: int) -> None:
        self.attended.append(layer)


@dataclass
class FakeLora:
    replayable: bool = True
    prepared: list[tuple[int, int]] = field(default_factory=list)  # segments, rows

    def prepare(self, segments: tuple[LoraSegment, ...], rows: int, *, captured: bool, decodes: bool) -> None:
        assert captured and decodes == (rows <= 4)
        self.prepared.append((len(segments), rows))


@dataclass
class FakeGraph:
    """The last one of a step adds positions to rows."""

    rows: Tensor
    positions: Tensor
    hidden: Tensor

    def replay(self) -> None:
        self.hidden.copy_(self.rows + self.positions[:, None])


class Graphs:
    """The real ones, as if captured: decodes of 1, 2, 4 rows, pieces of 8 and 16 rows over two layers."""

    def __init__(self, lora: FakeLora | None, pieces: tuple[int, ...] = (8, 16)):
        self.twins = {size: FakeAttention() for size in (1, 2, 4)}
        self.halves = {size: FakeAttention() for size in pieces}
        model: Any = SimpleNamespace(
            attends_one_by_one=True, config=SimpleNamespace(hidden_size=WIDTH, dtype=torch.float32)
        )
        parts: tuple[Any, ...] = (self.twins, self.halves, lora)
        self.graphs = CudaGraphs(model, *parts, torch.device("cpu"))
        for kind, count in ((self.graphs._decodes, 1), (self.graphs._pieces, 3)):
            if kind is None:
                continue
            for size, attention in kind._attention.items():
                for with_lora in (False, True):
                    rows, positions = kind._rows[:size], kind._positions[:size]
                    hidden = torch.zeros(size, WIDTH)
                    graphs: Any = [FakeGraph(rows, positions, hidden) for _ in range(count)]
                    kind._captured[size, with_lora] = _Captured(rows, positions, attention, graphs, hidden)

    def run(
        self, rows: int, *, decodes: bool, lora: bool = False, shared: tuple[SharedPages, ...] = ()
    ) -> Tensor | None:
        zero = torch.zeros(rows, dtype=torch.int64)
        meta = AttentionMeta((1,) * rows, (1,) * rows, zero[:, None], zero, zero, shared=shared)
        segments = (LoraSegment(0, rows, (0,), (1.0,)),) if lora else ()
        batch = ForwardBatch(zero, torch.arange(rows), meta, segments, zero)
        step = self.graphs.prepare(batch, decodes=decodes)
        return None if step is None else step.run(torch.full((rows, WIDTH), 100.0))


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_decodes_take_the_next_size(rows: int, size: int) -> None:
    graphs = Graphs(None)
    hidden = graphs.run(rows, decodes=True)
    assert hidden is not None
    assert hidden[:, 0].tolist() == [100.0 + i for i in range(rows)]
    assert [s for s, twin in graphs.twins.items() if twin.prepared] == [size]
    assert graphs.twins[size].prepared == [rows]


def test_decodes_that_share_pages_are_cut_where_layers_attend() -> None:
    shared = (SharedPages((0, 1, 2), 0, 9),)
    graphs = Graphs(None)
    assert graphs.run(4, decodes=True, shared=shared) is not None
    assert graphs.halves[8].attended == [0, 1] and not graphs.twins[4].prepared
    without = Graphs(None, pieces=())
    assert without.run(4, decodes=True, shared=shared) is not None
    assert without.twins[4].prepared == [4]
    assert without.run(3, decodes=False) is None


def test_pieces_attend_between_their_graphs() -> None:
    graphs = Graphs(None)
    hidden = graphs.run(11, decodes=False)
    assert hidden is not None
    assert hidden[:, 0].tolist() == [100.0 + i for i in range(11)]
    assert graphs.halves[16].attended == [0, 1]


@pytest.mark.parametrize(("rows", "decodes"), [(5, True), (17, False)])
def test_what_is_too_large_is_not_replayed(rows: int, decodes: bool) -> None:
    graphs = Graphs(None)
    assert graphs.run(rows, decodes=decodes) is None
    assert not any(a.prepared for a in (*graphs.twins.values(), *graphs.halves.values()))


def test_adapters_are_prepared_for_the_padded_rows() -> None:
    lora = FakeLora()
    graphs = Graphs(lora)
    assert graphs.run(3, decodes=True, lora=True) is not None
    assert graphs.run(9, decodes=False, lora=True) is not None
    assert graphs.run(2, decodes=True) is not None
    assert lora.prepared == [(1, 4), (1, 16)]


@pytest.mark.parametrize("lora", [None, FakeLora(replayable=False)])
def test_adapters_that_do_not_fit_are_not_replayed(lora: FakeLora | None) -> None:
    assert Graphs(lora).run(2, decodes=True, lora=True) is None


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])]
)
def test_decode_sizes(largest: int, sizes: list[int]) -> None:
    assert decode_sizes(largest) == sizes


def test_large_decodes_have_fewer_sizes() -> None:
    assert decode_sizes(300)[-4:] == [248, 256, 288, 300]


def test_piece_sizes() -> None:
    assert piece_sizes(2048, 64) == [
        *range(32, 256, 32), 256, 320, 384, 448, *range(512, 1024, 128), 1024, 1280, 1536, 1792, 2048, 2112
    ]  # fmt: skip
    assert piece_sizes(300, 10) == [*range(32, 257, 32), 300, 320, 332]
    assert piece_sizes(16, 4) == [16, 32, 48]
    assert piece_sizes(256, 256) == [*range(32, 257, 32), 320, 384, 448, 512]
    assert piece_sizes(2048, 1024)[-6:] == [2048, 2112, 2304, 2560, 2816, 3072]
    assert piece_sizes(0, 64) == []


class Pieces:
    """A piece attention whose result is the number of the layer, always in the same memory."""

    def __init__(self) -> None:
        self.out = torch.zeros(3)
        self.rotated: list[int] = []

    def rotate(self, layer: int, *_: object) -> None:
        self.rotated.append(layer)


@pytest.mark.parametrize("copies", [False, True])
def test_a_result_outlives_the_next_call_of_attention_only_as_a_copy(copies: bool) -> None:
    pieces, x = Pieces(), torch.zeros(1)
    cut = _Cut(pieces, lambda: pieces.out.fill_(pieces.rotated[-1]), copies)  # type: ignore[arg-type]
    first = cut.forward(1, x, x, x, (x, x))
    second = cut.forward(2, x, x, x, (x, x))
    assert second.tolist() == [2.0] * 3
    assert first.tolist() == ([1.0] * 3 if copies else [2.0] * 3)
