"""What a comparison of two results says."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import compare


def result(commit: str, *rows: tuple[str, float, str]) -> dict[str, Any]:
    return {"commit": commit, "gpu": "X", "rows": [{"row": n, "value": v, "unit": u} for n, v, u in rows]}


OLD = result("a", ("step", 4.0, "ms"), ("rate", 100.0, "tokens/s"), ("ratio", 1.0, "ratio"), ("gone", 1.0, "ms"))
NEW = result("b", ("step", 5.0, "ms"), ("rate", 150.0, "tokens/s"), ("ratio", 1.01, "ratio"), ("more", 1.0, "ms"))


def test_better_and_worse_the_largest_change_first() -> None:
    lines = [" ".join(line.split()) for line in compare.compare(OLD, NEW)]
    assert lines == [
        "commit: a -> b",
        "better rate 100 -> 150 tokens/s",
        "WORSE step 4 -> 5 ms",
        "same ratio 1 -> 1.01 ratio",
        "only in the old one: gone",
        "only in the new one: more",
        "1 better, 1 the same, 1 worse",
    ]
    assert compare.compare(OLD, NEW, 0.3)[-1] == "1 better, 2 the same, 0 worse"


def test_a_difference_below_zero_is_not_compared_and_a_changed_unit_is_an_error() -> None:
    assert compare.gain({"unit": "ms", "value": -1.0}, {"unit": "ms", "value": 2.0}) == 1.0
    with pytest.raises(ValueError, match="step: s there, ms here"):
        compare.gain({"unit": "s", "value": 1.0}, {"row": "step", "unit": "ms", "value": 2.0})


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, content in zip(paths, (OLD, NEW), strict=True):
        path.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, paths)])
    assert compare.main() == 0
    assert capsys.readouterr().out.endswith("1 better, 1 the same, 1 worse\n")
