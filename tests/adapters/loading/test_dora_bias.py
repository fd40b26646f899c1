"""Scale-shift pairs against the formulas of the papers, and that finishing takes its time without losing anything."""

import pytest
import torch

from multilora.adapters.adapter import Adapter, LowRank, Vector, VectorKind
from multilora.adapters.loading.dora_bias import DoraBiasLoader, complete_scale_shifts, facts_of_one
from multilora.adapters.loading.loader import Fetched, FetchJob
from multilora.adapters.packing.blocks import Blocks, PackTarget, pack, scale_shift_view
from multilora.lora.panels import PanelLayout
from multilora.lora.sites import LoraSite, LoraSlice

HIDDEN, Q, K = 24, 40, 32
SITES = (LoraSite(0, 0, "qkv_proj", HIDDEN, (LoraSlice("q_proj", 0, Q), LoraSlice("k_proj", Q, K))),)
RANDOM = torch.Generator().manual_seed(0)
WEIGHTS = {"q_proj": torch.randn(Q, HIDDEN, generator=RANDOM), "k_proj": torch.randn(K, HIDDEN, generator=RANDOM)}
BIASES = {"q_proj": torch.randn(Q, generator=RANDOM), "k_proj": None}
LOW = {
    m: LowRank(0, m, torch.randn(r, HIDDEN, generator=RANDOM), torch.randn(r, len(WEIGHTS[m]), generator=RANDOM), 0.5)
    for m, r in (("q_proj", 3), ("k_proj", 12))
}


def base(layer: int, module: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert layer == 0
    return WEIGHTS[module], BIASES[module]


def packed(*blocks: LowRank | Vector, page_bytes: int) -> tuple[PackTarget, PanelLayout, torch.Tensor]:
    target = PackTarget(SITES, torch.float32, page_bytes)
    own = Blocks.of(Adapter(blocks, "fingerprint"))
    layout = target.layout(own.shape(SITES))
    buffer = torch.zeros(layout.num_pages, page_bytes, dtype=torch.uint8)
    pack([own], target, layout, buffer)
    return target, layout, buffer


def pairs(layout: PanelLayout, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """module → fp32 [2, out]."""
    return {
        SITES[m.site].slices[m.slice].module: torch.cat([scale_shift_view(buffer, c) for c in parts], dim=1)
        for m, parts in zip(layout.matrices, layout.parts, strict=True)
        if m.scale_shift
    }


def norms(module: str) -> torch.Tensor:
    low = LOW[module]
    return (WEIGHTS[module] + 0.5 * low.b.T @ low.a).norm(dim=1)


@pytest.mark.parametrize("page_bytes", [512, 1024, 65536])
def test_dora_and_biases(page_bytes: int) -> None:
    m_q, m_k = torch.rand(Q, generator=RANDOM) + 1, torch.rand(K, generator=RANDOM) + 1
    bias, lora_bias = torch.randn(Q, generator=RANDOM), torch.randn(K, generator=RANDOM)
    target, layout, buffer = packed(
        *LOW.values(),
        Vector(0, "q_proj", VectorKind.MAGNITUDE, m_q),
        Vector(0, "q_proj", VectorKind.BIAS, bias),
        Vector(0, "k_proj", VectorKind.MAGNITUDE, m_k),
        Vector(0, "k_proj", VectorKind.LORA_BIAS, lora_bias, scaling=0.25),
        page_bytes=page_bytes,
    )
    steps = sum(1 for _ in complete_scale_shifts(buffer, layout, target, facts_of_one(base)))
    assert steps == 2
    found = pairs(layout, buffer)
    scale = m_q / norms("q_proj")
    torch.testing.assert_close(found["q_proj"][0], scale)
    torch.testing.assert_close(found["q_proj"][1], bias - scale * BIASES["q_proj"])
    torch.testing.assert_close(found["k_proj"][0], m_k / norms("k_proj"))
    torch.testing.assert_close(found["k_proj"][1], 0.25 * lora_bias)


def test_dora_keeps_the_base_models_bias() -> None:
    """y = scale · (W x + ΔW x) + b, though the layer has already added b."""
    magnitude = torch.rand(Q, generator=RANDOM) + 1
    target, layout, buffer = packed(
        LOW["q_proj"], Vector(0, "q_proj", VectorKind.MAGNITUDE, magnitude), page_bytes=4096
    )
    list(complete_scale_shifts(buffer, layout, target, facts_of_one(base)))
    scale, shift = pairs(layout, buffer)["q_proj"]
    x = torch.randn(HIDDEN, generator=RANDOM)
    low = LOW["q_proj"]
    plain = WEIGHTS["q_proj"] @ x
    delta = 0.5 * low.b.T @ (low.a @ x)
    torch.testing.assert_close(
        scale * (plain + BIASES["q_proj"] + delta) + shift,
        magnitude / norms("q_proj") * (plain + delta) + BIASES["q_proj"],
    )


def test_a_bias_without_low_rank() -> None:
    bias = torch.randn(Q, generator=RANDOM)
    target, layout, buffer = packed(LOW["k_proj"], Vector(0, "q_proj", VectorKind.BIAS, bias), page_bytes=4096)
    list(complete_scale_shifts(buffer, layout, target, facts_of_one(base)))
    scale, shift = pairs(layout, buffer)["q_proj"]
    assert torch.equal(scale, torch.ones(Q))
    torch.testing.assert_close(shift, bias - BIASES["q_proj"])


class OneByOne:
    """A loader that brings what it was given."""

    working = False

    def __init__(self, results: list[tuple[Fetched, torch.Tensor | None]]):
        self.results = results
        self.closed = False

    def submit(self, job: FetchJob) -> None: ...

    def poll(self) -> list[tuple[Fetched, torch.Tensor | None]]:
        found, self.results = self.results, []
        return found

    def fileno(self) -> int | None:
        return 7

    def close(self) -> None:
        self.closed = True


def test_slices_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    target, layout, buffer = packed(
        *LOW.values(),
        Vector(0, "q_proj", VectorKind.MAGNITUDE, torch.ones(Q)),
        Vector(0, "k_proj", VectorKind.MAGNITUDE, torch.ones(K)),
        page_bytes=4096,
    )
    special = Fetched(version=1, shape=layout.shape), buffer
    plain = Fetched(version=2, shape=packed(LOW["q_proj"], page_bytes=4096)[1].shape), buffer
    failed = Fetched(version=3, kind="AdapterInvalid", message="no"), None
    now = 0.0

    def clock() -> float:  # each question costs half of what a slice may take
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr("multilora.adapters.loading.dora_bias.monotonic", clock)
    inner = OneByOne([special, plain, failed])
    loader = DoraBiasLoader(inner, target, facts_of_one(base), seconds=1.5)
    assert not loader.working
    first = loader.poll()
    assert [r.version for r, _ in first] == [2, 3], "what needs nothing goes straight through"
    assert loader.working
    polls = 0
    while not (done := loader.poll()):
        polls += 1
        assert polls < 5
    assert [r.version for r, _ in done] == [1] and done[0][1] is buffer
    assert not loader.working
    torch.testing.assert_close(pairs(layout, buffer)["k_proj"][0], 1 / norms("k_proj"))
    assert loader.fileno() == 7
    loader.close()
    assert inner.closed
