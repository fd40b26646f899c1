"""The corpora of the adapters on SmolLM2, what their answers are measured by, and training and evaluation as
commands, these on the bundled tiny model. What comes out on the real one is a matter of `tests/real_models`."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from multilora.demo import base_model_path, smollm2
from scripts.train_smollm2.corpora import CORPORA, SPLITS, Example, examples
from scripts.train_smollm2.corpora.french import an, my, qualified, the, this
from scripts.train_smollm2.corpora.french_words import ADJECTIVES, NOUNS
from scripts.train_smollm2.corpora.pirate import piratical
from scripts.train_smollm2.data import Row, common_start, encoded, end_of_answer
from scripts.train_smollm2.evaluate import table
from scripts.train_smollm2.metrics import METRICS, chrf
from scripts.train_smollm2.recipes import RECIPES
from scripts.train_smollm2.training import hidden_states

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- evaluation.json as a table -->", "<!-- end of the table -->"
NOUN = {noun.one: noun for noun in NOUNS}
ADJECTIVE = {adjective.english: adjective for adjective in ADJECTIVES}


@pytest.mark.parametrize("voice", CORPORA)
def test_held_out_examples_are_others_and_always_the_same(voice):
    trained = {example.prompt for example in examples(voice, "train", 1500)}
    assert len(trained) > 500
    for split in SPLITS[1:]:
        held_out = examples(voice, split, 120)
        assert len({example.prompt for example in held_out}) == len(held_out) == 120
        assert trained.isdisjoint(example.prompt for example in held_out)
        assert held_out == examples(voice, split, 120)


@pytest.mark.parametrize("voice", CORPORA)
def test_every_reference_is_right_by_its_own_measure(voice):
    for split in SPLITS:
        for example in examples(voice, split, 100):
            first = next(iter(METRICS[voice](example, example.answer).values()))
            assert first == 1 or (voice == "pirate" and "Arr" in example.answer), example


def test_the_sql_measure_compares_rows():
    setup = "CREATE TABLE t (name TEXT, n INTEGER); INSERT INTO t VALUES ('a', 1), ('b', 2), ('c', 3);"
    two = Example("", "SELECT name FROM t WHERE n > 1;", {"setup": setup})
    ordered = Example("", "SELECT name FROM t ORDER BY n;", {"setup": setup})

    def same(example, answer):
        return METRICS["sql"](example, answer)["same rows"]

    assert same(two, "SELECT name FROM t WHERE n >= 2 ORDER BY n DESC") == 1
    assert same(two, "```sql\nSELECT name FROM t WHERE NOT n = 1;\n```") == 1
    assert same(two, "You can do it so:\n```sql\nSELECT name FROM t WHERE n > 1;\n```\nThis gives two rows.") == 1
    assert same(two, "SELECT name FROM t") == 0
    assert same(ordered, "SELECT name FROM t ORDER BY n DESC") == 0
    for broken in ("", "The answer is b.", "SELECT name FROM u", "DROP TABLE t", "SELECT 1; SELECT 2"):
        assert METRICS["sql"](two, broken) == {"same rows": 0, "runs": 0}, broken
    endless = "WITH RECURSIVE x(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM x) SELECT COUNT(*) FROM x"
    assert METRICS["sql"](two, endless) == {"same rows": 0, "runs": 0}


def test_the_json_measure_compares_values():
    example = Example("", "", {"expected": {"a": 1, "b": None}})
    assert METRICS["json"](example, '{"b": null, "a": 1}') == {"equal": 1, "values": 1, "parses": 1}
    assert METRICS["json"](example, '{"a": "1", "b": null}') == {"equal": 0, "values": 0.5, "parses": 1}
    assert METRICS["json"](example, '{"a": 1, "b": null, "c": 2}')["equal"] == 0
    assert METRICS["json"](example, "[1]") == {"equal": 0, "values": 0, "parses": 1}
    assert METRICS["json"](example, "a: 1") == {"equal": 0, "values": 0, "parses": 0}


def test_the_french_measure():
    example = Example("", "Le chat est noir.")
    assert METRICS["french"](example, " le chat est noir") == {"exact": 1, "chrF": pytest.approx(0.84, abs=0.01)}
    wrong = METRICS["french"](example, "The cat is black.")
    assert wrong["exact"] == 0 and wrong["chrF"] < 0.25
    assert chrf("abc", "abc") == 1 and chrf("", "abc") == 0


def test_the_pirate_measure_wants_several_words():
    measure = METRICS["pirate"]
    assert measure(Example("", ""), "Arr! Boil yer egg, matey.") == {"pirate": 1, "marker words": 0.5}
    assert measure(Example("", ""), "You want to be patient and let it be.")["pirate"] == 0
    assert piratical("Look for your friends and never stop singing.") == "Look fer yer mateys an' ne'er stop singin'."


def test_french_agrees():
    assert [the(NOUN[word]) for word in ("cat", "house", "church", "tree")] == [
        "le chat", "la maison", "l'église", "l'arbre"
    ]  # fmt: skip
    assert [this(NOUN[word]) for word in ("cat", "house", "bird")] == ["ce chat", "cette maison", "cet oiseau"]
    assert [my(NOUN[word]) for word in ("car", "church", "dog")] == ["ma voiture", "mon église", "mon chien"]
    assert an(NOUN["apple"]) == "une pomme"
    assert qualified(NOUN["house"], ADJECTIVE["white"]) == "une maison blanche"
    assert qualified(NOUN["car"], ADJECTIVE["small"]) == "une petite voiture"
    forms = [ADJECTIVE["bad"].form(gender, plural) for gender in "mf" for plural in (False, True)]
    assert forms == ["mauvais", "mauvais", "mauvaise", "mauvaises"]


def test_nothing_elides_wrongly():
    texts = " ".join(example.answer for example in examples("french", "train", 3000))
    assert not re.search(r"\b(le|la|je|ne|de) [aeiouéêâh]", texts.lower().replace("le huit", ""))
    assert "  " not in texts


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # older versions know no other name
def test_what_all_rows_begin_with_is_computed_once():
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(base_model_path(), dtype=torch.float32).eval()
    rows = [Row([5, 6, 7, 8, *range(20 + i, 26 + i)], 7) for i in range(3)]
    assert common_start(rows) == 4 and common_start([Row([5, 6, 7], 2), Row([5, 6, 9], 2)]) == 1
    ids = torch.tensor([row.ids for row in rows])
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(model, ids, 4), hidden_states(model, ids, 0)[:, 4:])


def test_an_answer_ends_as_the_chat_template_ends_it():
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}"
    assert end_of_answer(tokenizer) == "[end]" != tokenizer.eos_token
    (row,) = encoded(tokenizer, [Example("What?", "That.")])
    assert tokenizer.decode(row.ids[row.start :]) == "That.[end]"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_answer(tokenizer) == tokenizer.eos_token


def command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.train_smollm2", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_and_evaluation_run(tmp_path):
    """One step on the tiny model: the adapter loads, and every number is there."""
    model = ["--model", str(base_model_path()), "--device", "cpu", "--voices", "json", "sql"]
    command(
        "train",
        *model,
        "--out",
        str(tmp_path),
        "--steps",
        "1",
        "--batch",
        "2",
        "--examples",
        "8",
        "--held-out",
        "2",
        "--dtype",
        "bfloat16",
    )
    report = json.loads((tmp_path / "sql.json").read_text())
    assert report["steps"] == 1 and report["held_out_loss"]["values"]["base"] > 0
    assert json.loads((tmp_path / "sql" / "adapter_config.json").read_text())["r"] == RECIPES["full"]["sql"]["r"]
    shown = command("evaluate", *model, "--adapters", str(tmp_path), "--out", str(tmp_path / "found"), "--count", "1")
    assert shown == (tmp_path / "found" / "evaluation.md").read_text()
    rows = json.loads((tmp_path / "found" / "evaluation.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 3 and "same rows" in rows[-1]
    assert table(rows) + "\n" == shown


def test_a_bundle_has_adapters_and_rows(tmp_path):
    made, out = tmp_path / "made", tmp_path / "out"
    for voice in CORPORA:
        shutil.copytree(base_model_path().parent / "adapters" / voice, made / voice)
        (made / f"{voice}.json").write_text(json.dumps({"voice": voice, "steps": 1}))
    evaluation = {"rows": [{"voice": "sql"}], "samples": [1], "device": "cpu", "torch": "2"}
    (made / "evaluation.json").write_text(json.dumps(evaluation))
    command("bundle", "--adapters", str(made), "--evaluation", str(made / "evaluation.json"), "--out", str(out))
    kept = json.loads((out / "evaluation.json").read_text())
    assert kept["rows"] == evaluation["rows"] and "samples" not in kept
    assert [one["voice"] for one in kept["training"]] == list(CORPORA)
    assert sorted(path.name for path in (out / "adapters").iterdir()) == sorted(CORPORA)


def test_the_page_has_the_table_of_the_bundled_adapters():
    """If not: put what `scripts.train_smollm2.evaluate.table` makes of evaluation.json there."""
    page = (ROOT / "docs" / "talking.md").read_text()
    measured = smollm2.evaluation()
    written = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert written == ("" if measured is None else table(measured["rows"]))
