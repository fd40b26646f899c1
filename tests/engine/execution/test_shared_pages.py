"""Which decodes are found to share which pages; and that answers stay the same where those are read once."""

from pathlib import Path

import numpy as np
import pytest
from fakes.engine_driver import EngineDriver
from fakes.models import make_adapter, make_tiny_model
from hypothesis import given
from hypothesis import strategies as st

from multilora.batch import SharedPages
from multilora.engine.execution import shared_pages
from multilora.engine.execution.shared_pages import find_shared

PAGE = 4


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_pages, "WORTH", 1)
    monkeypatch.setattr(shared_pages, "SHORTEST", 1)
    monkeypatch.setattr(shared_pages, "FEWEST", 2)


def found(
    rows: list[list[int]], lens: list[int], decodes: list[int] | None = None
) -> list[tuple[list[int], int, int]]:
    table = np.zeros((len(rows), max(map(len, rows)) + 1), np.int64)
    for row, pages in zip(table, rows, strict=True):
        row[: len(pages)] = pages
    which = np.array(range(len(rows)) if decodes is None else decodes, np.int64)
    shared = find_shared(table, which, np.array(lens, np.int64), PAGE)
    return [(list(one.requests), one.first, one.blocks) for one in shared]


def test_level_by_level(worth_it: None) -> None:
    rows = [[1, 2, 3, 10], [1, 2, 4, 5, 11], [1, 2, 4, 5, 12], [9, 2, 4, 5, 13]]
    assert found(rows, [16, 18, 20, 17]) == [([0, 1, 2], 0, 2), ([1, 2], 2, 2)]


def test_the_page_of_the_new_token_is_no_shared_one(worth_it: None) -> None:
    """Though two requests were to have the same one; and a page that both fill is."""
    assert found([[1, 2], [1, 2]], [8, 8]) == [([0, 1], 0, 1)]
    assert found([[1, 2, 3], [1, 2, 4]], [9, 9]) == [([0, 1], 0, 2)]


def test_only_decodes(worth_it: None) -> None:
    rows = [[1, 2, 3], [1, 2, 4], [1, 2, 5]]
    assert found(rows, [9, 9, 9], decodes=[0, 2]) == [([0, 2], 0, 2)]
    assert found(rows, [9, 9, 9], decodes=[1]) == []


def test_more_requests_than_the_host_can_launch(worth_it: None) -> None:
    count = shared_pages.MOST_ROWS
    rows = [[1, 2, 10 + i] for i in range(count + 1)]
    assert found(rows[:-1], [9] * count) == [(list(range(count)), 0, 2)]
    assert found(rows, [9] * (count + 1)) == []


def test_short_stretches_go_into_longer_ones(worth_it: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_pages, "SHORTEST", 3 * PAGE)
    rows = [[1, 2, 3, 4, 10], [1, 2, 3, 4, 11], [1, 7, 8, 9, 12]]
    assert found(rows, [18, 18, 18]) == [([0, 1], 0, 4)]


def test_prompts_that_go_on_from_each_other(worth_it: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each a page longer than the one before: there is a limit to how often they are divided."""
    count = 300
    monkeypatch.setattr(shared_pages, "MOST_ROWS", count)
    rows = [[*range(1, i + 2), 1000 + i] for i in range(count)]
    stretches = found(rows, [4 * len(pages) for pages in rows])
    assert len(stretches) == shared_pages.MOST_LEVELS
    assert [len(requests) for requests, *_ in stretches] == [count - i for i in range(len(stretches))]


def test_what_is_not_worth_it(worth_it: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[1, 2, 3], [1, 2, 4], [1, 2, 5]]
    monkeypatch.setattr(shared_pages, "WORTH", 16)  # tokens that two requests need not read again
    assert found(rows, [9, 9, 9]) == [([0, 1, 2], 0, 2)]
    monkeypatch.setattr(shared_pages, "WORTH", 17)
    assert found(rows, [9, 9, 9]) == []
    monkeypatch.setattr(shared_pages, "WORTH", 1)
    monkeypatch.setattr(shared_pages, "FEWEST", 4)
    assert found(rows, [9, 9, 9]) == []


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(0, 3))
def test_against_every_pair(rows: list[list[int]], less: int) -> None:
    """Requests have exactly those pages in common that they are said to, as far as others have them, too."""
    lens = [max(1, PAGE * len(pages) - less) for pages in rows]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WORTH", 1), ("SHORTEST", 1), ("FEWEST", 2), ("MOST_LEVELS", 99)):
            patch.setattr(shared_pages, name, value)
        stretches = found(rows, lens)
    whole = [(n - 1) // PAGE for n in lens]
    common = [0] * len(rows)
    for requests, first, blocks in stretches:
        assert len(requests) > 1 and blocks > 0
        assert len({tuple(rows[r][: first + blocks]) for r in requests}) == 1
        for r in requests:
            assert common[r] == first, "a request's stretches follow each other"
            common[r] = first + blocks
    for r, pages in enumerate(rows):
        most = 0
        for other, theirs in enumerate(rows):
            same = next((i for i, (a, b) in enumerate(zip(pages, theirs, strict=False)) if a != b), len(pages))
            most = max(most, min(same, whole[r], whole[other]) if other != r else 0)
        assert common[r] == most


def test_answers_stay_the_same(tmp_path: Path, worth_it: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters and the base model, prompts that begin alike, of which some begin alike for longer."""
    pytest.importorskip("triton")
    from multilora.attention import backends
    from multilora.attention.cascade import CascadeStep

    monkeypatch.setitem(backends.OBSTACLES, "triton", lambda *_: None)  # in the interpreter
    make_tiny_model(tmp_path / "model")
    make_adapter(tmp_path / "a", tmp_path / "model", seed=1)
    steps: list[tuple[SharedPages, ...]] = []
    make = CascadeStep.make.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        CascadeStep, "make", classmethod(lambda cls, *args: steps.append(args[3]) or make(cls, *args))
    )
    system, asked = list(range(3, 20)), [[40] * 4, [41] * 3]
    prompts = [system + asked[i % 2] + [70 + i] for i in range(3)]
    said = []
    for cascade in (False, True):
        driver = EngineDriver(
            tmp_path / "model",
            {"a": tmp_path / "a"},
            page_size=PAGE,
            attention_backend="triton",
            enable_cascade_attention=cascade,
        )
        for name in (None, "a"):  # the first one leaves its pages in the cache
            driver.submit(system + [60], name, max_new_tokens=1)
        driver.run()
        rids = [
            driver.submit(prompt, name, max_new_tokens=2, ignore_eos=True)
            for name in (None, "a")
            for prompt in prompts
        ]
        driver.run()
        said.append([driver.answers[rid].tokens for rid in rids])
        assert bool(steps) == cascade
        driver.close()
    assert said[0] == said[1]
    assert max(len(step) for step in steps) >= 2, "the base model's requests, and the adapter's"
