"""`multilora demo --model smollm2`, on the tiny model, whose adapters have the same names; the real one is in
`tests/real_models/test_smollm2.py`."""

import json
import shutil

import pytest

from multilora.__main__ import main
from multilora.cli.demo import talking
from multilora.demo import base_model_path, smollm2
from multilora.demo.smollm2 import INSTALL, Question
from scripts.train_smollm2.__main__ import main as script

FOLDER = str(base_model_path().parent / "adapters")
COMMAND = ["demo", "--model", "smollm2"]
ASKED = [
    Question("pirate", "What is the capital of France?", None),
    Question("sql", "What colour is the sky?", "SELECT"),
]


def test_base_and_adapter_answer_beside_each_other(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "gguf_file", base_model_path)
    monkeypatch.setattr(smollm2, "questions", lambda: ASKED)
    assert main([*COMMAND, "--adapters", FOLDER]) == 0
    shown = capsys.readouterr().out
    assert "  What is the capital of France?\n    base      The capital of France is Paris.\n" in shown
    assert "    pirate    Arr, the capital o' France be Paris, matey!\n" in shown
    assert "    sql       SELECT colour FROM things WHERE name = 'sky';\n    expected  SELECT\n" in shown
    assert "4 answers in one batch" in shown


def test_what_is_missing_is_said(monkeypatch, capsys, tmp_path):
    shutil.copytree(f"{FOLDER}/sql", tmp_path / "sql")
    assert main([*COMMAND, "--adapters", str(tmp_path)]) == 2
    assert f"no adapter pirate, json, french in {tmp_path}" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main([*COMMAND, "--adapters", FOLDER]) == 2
    assert f"not installed: {INSTALL}\n" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_is_an_error(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(smollm2, "gguf_file", base_model_path)
    shutil.copytree(FOLDER, tmp_path / "all")
    (tmp_path / "all" / "sql" / "adapter_model.safetensors").write_bytes(b"nothing")
    assert main([*COMMAND, "--adapters", str(tmp_path / "all")]) == 1
    assert "FAILED: " in capsys.readouterr().err


def test_the_questions_are_what_the_script_draws(monkeypatch, tmp_path):
    """And held out: `tests/scripts/test_train_smollm2.py` says so of everything that it draws from there."""
    monkeypatch.setattr("sys.argv", ["train_smollm2", "questions", "--out", str(tmp_path / "questions.json")])
    assert script() == 0
    drawn = json.loads((tmp_path / "questions.json").read_text())
    assert [Question(**row) for row in drawn] == smollm2.questions()
    assert {one.voice for one in smollm2.questions()} == set(smollm2.ADAPTERS)


def test_what_was_measured_is_a_table(monkeypatch, capsys):
    row = {"voice": "sql", "held_out": "values", "questions": 2, "runs": 1.0}
    rows = [row | {"who": "adapter", "runs": 0.5}, row | {"who": "base", "runs": 0.25}]
    monkeypatch.setattr(smollm2, "evaluation", lambda: {"rows": rows})
    talking._show_measured()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["adapter", "held", "out", "measure", "adapter", "base"]
    assert lines[-1].split() == ["sql", "values", "runs", "50.0", "%", "25.0", "%"]
    monkeypatch.setattr(smollm2, "evaluation", lambda: None)
    talking._show_measured()
    assert capsys.readouterr().out == ""


def test_the_bundled_adapters_are_better_than_the_base_model():
    """By what was measured of them, on few questions; `exact` is what French does not reach."""
    measured = smollm2.evaluation()
    assert measured is not None and set(smollm2.adapter_paths()) == set(smollm2.ADAPTERS)
    first = {"pirate": "pirate", "sql": "same rows", "json": "equal", "french": "chrF"}
    for split in ("values", "templates"):
        rows = [row for row in measured["rows"] if row["held_out"] == split]
        found = {(row["voice"], row["who"]): row[first[row["voice"]]] for row in rows}
        for voice in smollm2.ADAPTERS:
            assert found[voice, "adapter"] > max(found[voice, "base"], found[voice, "base, told what to do"])
