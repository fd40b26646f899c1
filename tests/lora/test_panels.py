from hypothesis import given, settings
from hypothesis import strategies as st

from multilora.lora.panels import RANK_GRANULE, AdapterShape, PanelGeometry, make_layout, matrices_of, round_rank
from multilora.lora.sites import LoraSite, LoraSlice


def llama_8b() -> tuple[LoraSite, ...]:
    sites = []
    for layer in range(32):
        shapes = [
            ("qkv_proj", 4096, [("q_proj", 4096), ("k_proj", 1024), ("v_proj", 1024)]),
            ("o_proj", 4096, [("o_proj", 4096)]),
            ("gate_up_proj", 4096, [("gate_proj", 14336), ("up_proj", 14336)]),
            ("down_proj", 14336, [("down_proj", 4096)]),
        ]
        for name, width, outs in shapes:
            slices, offset = [], 0
            for module, out in outs:
                slices.append(LoraSlice(module, offset, out))
                offset += out
            sites.append(LoraSite(len(sites), layer, name, width, tuple(slices)))
    return tuple(sites)


def test_llama_8b_fits_exactly():
    """DESIGN's figure: rank 8, 16 and 64 take 20, 40 and 160 pages of 2 MiB, no byte of padding but the last page."""
    sites = llama_8b()
    geometry = PanelGeometry(2 << 20, 2)
    for rank, pages in ((8, 20), (16, 40), (64, 160)):
        ranks = tuple(tuple(rank for _ in site.slices) for site in sites)
        layout = make_layout(sites, AdapterShape(ranks), geometry)
        assert layout.num_pages == pages
        assert all(c.columns == m.width for m, cs in zip(layout.matrices, layout.parts, strict=True) for c in cs)


def test_rounding_is_to_eight():
    assert [round_rank(r) for r in (0, 1, 8, 9, 64)] == [0, 8, 8, 16, 64]


@settings(max_examples=60, deadline=None)
@given(
    widths=st.tuples(st.integers(16, 200), st.integers(16, 200), st.integers(16, 200)),
    ranks=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    page=st.sampled_from([512, 1024, 4096, 65536]),
)
def test_parts_tile_every_matrix_and_never_overlap(widths, ranks, page):
    hidden, out_1, out_2 = widths
    sites = (LoraSite(0, 0, "x", hidden, (LoraSlice("a", 0, out_1), LoraSlice("b", out_1, out_2))),)
    layout = make_layout(sites, AdapterShape((ranks,)), PanelGeometry(page, 4))
    assert layout.matrices == matrices_of(sites, AdapterShape((ranks,)))
    taken: set[tuple[int, int]] = set()
    for matrix, parts in zip(layout.matrices, layout.parts, strict=True):
        cells = {(c.row, col) for c in parts for col in range(c.col, c.col + c.columns)}
        assert len(cells) == matrix.rank // RANK_GRANULE * matrix.width == sum(c.columns for c in parts)
        for part in parts:
            size = RANK_GRANULE * part.columns * 4
            assert 0 <= part.page < layout.num_pages and part.offset + size <= page
            span = {(part.page, byte) for byte in range(part.offset, part.offset + size, 4)}
            assert not span & taken
            taken |= span
