"""Packing jobs as a table: what it says is what `write_jobs` does.

Covers `pack_table.py` too.
"""

from itertools import pairwise

import pytest
import torch
from pack_tables import apply, named

from multilora.adapters import pack_table as constants
from multilora.adapters.packing import placed_jobs
from multilora.adapters.packing.pack_jobs import PackJob, Span, write_jobs
from multilora.adapters.packing.placed_jobs import FileWeight, PlacedJob, file_parts, pack_table

PAGE = 4096
PAGES = 16
BEGIN = 103


def adapter(stored: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, list[FileWeight], list[PackJob]]:
    """The numbers of a file, and jobs over them: A and a transposed B of rank 12, in stretches that do not touch."""
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(n, m, generator=g).to(stored) for n, m in ((12, 70), (100, 12), (8, 64)))
    file = torch.cat([x.flatten() for x in (a, b, c)])
    starts = [0, a.numel(), a.numel() + b.numel()]
    jobs = [
        PackJob("a", a, 1.0, (Span(0, 8, 0, 70, 0), Span(8, 4, 0, 70, PAGE))),
        PackJob("b", b.T, 1.7, (Span(0, 12, 0, 64, 2 * PAGE), Span(0, 12, 64, 36, 5 * PAGE + 640))),
        PackJob("c", c, -0.3, (Span(0, 8, 0, 64, 7 * PAGE),)),
    ]
    weights = [
        FileWeight(BEGIN + 2 * start, 2 * x.numel(), [PlacedJob.of(job, 0)])
        for start, x, job in zip(starts, (a, b, c), jobs, strict=True)
    ]
    return file, weights, jobs


def packed(jobs: list[PackJob], dtype: torch.dtype) -> torch.Tensor:
    pages = torch.zeros(PAGES, PAGE, dtype=torch.uint8)
    write_jobs(jobs, dtype, pages)
    return pages


@pytest.mark.parametrize("part_bytes", [constants.PART_BYTES, 3000])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_says_what_write_jobs_does(
    stored: torch.dtype, dtype: torch.dtype, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed_jobs, "PART_BYTES", part_bytes)
    file, weights, jobs = adapter(stored)
    table = pack_table(weights, BEGIN, BEGIN + 2 * len(file), dtype)
    assert len(table.parts) == (1 if part_bytes > 3000 else 3) and table.nbytes == 2 * len(file)
    assert sum(nbytes for _, nbytes, _, _ in table.parts) == table.nbytes
    pages = torch.zeros(PAGES, PAGE, dtype=torch.uint8)
    pages[:9] = 0xAA  # what was there before
    expected = packed(jobs, dtype)
    apply(table, file, pages)
    written = named(table, pages)
    found, wanted = pages.view(torch.int16).view(-1), expected.view(torch.int16).view(-1)
    assert torch.equal(found[written], wanted[written]), "rows that nobody trained are zero, too"
    assert not bool(wanted[~written].any())


def test_where_no_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    file, weights, _ = adapter(torch.bfloat16)
    end = BEGIN + 2 * len(file)
    assert pack_table(weights, BEGIN, end, torch.float32) is None
    wide = [
        FileWeight(w.start, w.nbytes, [PlacedJob.of(PackJob("a", torch.zeros(2, 2), 1.0, ()), 0)]) for w in weights
    ]
    assert pack_table(wide, BEGIN, end, torch.bfloat16) is None
    assert pack_table([weights[0], wide[1]], BEGIN, end, torch.bfloat16) is None
    monkeypatch.setattr(placed_jobs, "TABLE_BYTES", 4 * 64)
    assert pack_table(weights, BEGIN, end, torch.bfloat16) is None
    monkeypatch.undo()
    monkeypatch.setattr(placed_jobs, "PART_BYTES", 2000)
    assert pack_table(weights, BEGIN, end, torch.bfloat16) is None


def test_parts_of_a_file_have_all_of_its_numbers() -> None:
    file, weights, _ = adapter(torch.float16)
    size = BEGIN + 2 * len(file)
    parts = file_parts(weights, size, 500)
    assert [part.start for part in parts] == list(range(0, size, 500))
    assert sum(part.nbytes for part in parts) == size
    found = [(part.start + n.start, n.nbytes, n.name, n.scaling) for part in parts for n in part.numbers]
    assert sum(nbytes for _, nbytes, _, _ in found) == 2 * len(file)
    for weight, name, scaling in zip(weights, "abc", (1.0, 1.7, -0.3), strict=True):
        own = [(start, nbytes) for start, nbytes, n, s in found if (n, s) == (name, scaling)]
        assert own[0][0] == weight.start and sum(own[-1]) == weight.start + weight.nbytes
        assert all(sum(one) == other[0] for one, other in pairwise(own))
