"""The benchmark of speculative decoding runs and says what it must."""

import argparse
import json
from pathlib import Path

from bench import speculation


def test_a_row_for_each_text_and_batch(tmp_path: Path):
    args = argparse.Namespace(
        device="cpu", dims="tiny", batches=[1, 2], new=12, rounds=1, out=str(tmp_path / "out.json")
    )
    result = speculation.run(tmp_path, args)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    names = [row["row"] for row in result["rows"]]
    assert names == [f"{text}, {n} at a time, base" for n in (1, 2) for text in speculation.TEXTS]
    for row in result["rows"]:
        assert row["equal"] == 1
        assert row["value"] > 0
        assert 0 <= row["acceptance"] <= 1
