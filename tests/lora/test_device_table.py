"""How much room the device tables take: enough for whatever fits the arena, and little where a slice is narrow."""

import itertools

import pytest

pytest.importorskip("triton")

from multilora.lora.device_table import _per_page, table_bytes_per_page
from multilora.lora.panels import AdapterShape, PanelGeometry, make_layout
from multilora.lora.sites import LoraSite, LoraSlice

QKV = (LoraSlice("q_proj", 0, 64), LoraSlice("k_proj", 64, 16, bias=True), LoraSlice("v_proj", 80, 16))
SITES = (
    LoraSite(0, 0, "qkv_proj", 48, QKV),
    LoraSite(1, 0, "gate", 48, (LoraSlice("gate", 0, 3),)),
    LoraSite(2, 0, "shared_expert_gate", 48, (LoraSlice("shared_expert_gate", 0, 1),)),
    LoraSite(3, 0, "experts.down_proj", 16, (LoraSlice("experts.down_proj", 0, 48),), 4),
)
NO_RANKS = ((0, 0, 0), (0,), (0,), (0,))
SHARED = frozenset({(3, -1)}), frozenset({(3, 0)}), frozenset({(3, -1), (3, 0)})


def only(index: int, rank: int, pair: int = 0, shared: frozenset[tuple[int, int]] = frozenset()) -> AdapterShape:
    """Something at one slice (counted through all sites) and nothing elsewhere."""
    flat = [0] * 6
    flat[index] = rank
    pairs = [0] * 6
    pairs[index] = pair

    def by_site(values: list[int]) -> tuple[tuple[int, ...], ...]:
        return (tuple(values[:3]), *((v,) for v in values[3:]))

    return AdapterShape(by_site(flat), by_site(pairs) if pair else (), (), shared)


SHAPES = [
    *(only(i, rank, pair) for i, rank, pair in itertools.product(range(5), (8, 40), (0, 1))),
    *(only(5, rank, 0, shared) for rank in (8, 40) for shared in (frozenset(), *SHARED)),
    only(1, 0, 2),
]


@pytest.mark.parametrize("page_bytes", [512, 1024, 1 << 16])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_there_are_addresses_for_everything_that_fits_the_arena(page_bytes: int, itemsize: int) -> None:
    geometry = PanelGeometry(page_bytes, itemsize)
    _, addresses = _per_page(SITES, geometry)
    for shape in SHAPES:
        layout = make_layout(SITES, shape, geometry)
        assert len(layout.positions) * page_bytes <= addresses * max(layout.used_bytes, page_bytes)


def test_narrow_slices_cost_little() -> None:
    """The gate of a shared expert has one column; a page of 1.5 MB does not take a table of as many bytes."""
    wide = (
        LoraSite(0, 0, "o_proj", 4096, (LoraSlice("o_proj", 0, 2048),)),
        LoraSite(1, 0, "shared_expert_gate", 2048, (LoraSlice("shared_expert_gate", 0, 1),)),
    )
    assert table_bytes_per_page(wide, PanelGeometry(3 << 19, 2)) < 3000
