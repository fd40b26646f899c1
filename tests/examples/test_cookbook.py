"""Every example of the cookbook, run as a person runs it, against the bundled model."""

import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
from running_server import ANSWERS, PATHS, PROMPT, serving

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    paths = [f"{name}={PATHS[name]}" for name in ("pirate", "sql")]
    with serving(tmp_path_factory, "--lora-paths", *paths) as server:
        yield server.url


def run(name: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_is_in_the_cookbook_and_here():
    cookbook = (ROOT / "docs" / "cookbook.md").read_text()
    assert set(re.findall(r"<!-- example: (\S+) -->", cookbook)) == {path.name for path in EXAMPLES}
    assert all(f'"{path.name}"' in Path(__file__).read_text() for path in EXAMPLES)


@pytest.mark.slow
def test_chat(url):
    base, pirate = run("chat.py", url, "pirate")
    assert "Arr" in pirate and "Arr" not in base


@pytest.mark.slow
def test_side_by_side(url):
    lines = run("side_by_side.py", url, PROMPT)
    assert lines == [f"{name or 'base'}: {ANSWERS[name]}" for name in (None, "pirate", "sql")]


@pytest.mark.slow
def test_hot_swap(url):
    assert run("hot_swap.py", url) == [f"step-0: {ANSWERS['pirate']}", f"step-1: {ANSWERS[None]}"]


@pytest.mark.slow
def test_batch():
    lines = run("batch.py")
    assert lines[0] == f"base: {ANSWERS[None]}" and len(lines) == 5
    assert f"sql: {ANSWERS['sql']}" in lines


@pytest.mark.slow
def test_compositions():
    asked, kept = run("compositions.py")
    assert asked.removeprefix("in the request: ") == kept.removeprefix("kept: ") != ""


@pytest.mark.slow
def test_structured_output():
    [line] = run("structured_output.py")
    assert list(json.loads(line.replace("'", '"'))) == ["answer"]


@pytest.mark.slow
def test_embeddings():
    lines = run("embeddings.py")
    assert [line.partition(":")[0] for line in lines] == ["base", "sql"]
    assert all(-1 <= float(x) <= 1.001 for line in lines for x in line.partition(": ")[2].split(", "))


@pytest.mark.slow
def test_activated_lora():
    base, sql, pirate = run("activated_lora.py")
    assert "yen" in base and "SELECT" in sql and "Arr" in pirate
    assert [line.partition("(")[2] for line in (base, sql, pirate)] == [
        f"{cached} of 34 tokens from the cache)" for cached in (0, 16, 16)
    ]


class FakeGradio(types.ModuleType):
    """What the example uses of Gradio 6, which is not installed here. `launched`: pages and their other inputs."""

    def __init__(self) -> None:
        super().__init__("gradio")
        self.launched: list[tuple[object, list[SimpleNamespace]]] = []

    def Dropdown(self, **given: object) -> SimpleNamespace:  # noqa: N802  (Gradio's name)
        return SimpleNamespace(**given)

    def ChatInterface(  # noqa: N802
        self, answer: object, *, additional_inputs: list[SimpleNamespace], title: str
    ) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda: self.launched.append((answer, additional_inputs)))


@pytest.mark.slow
def test_gradio_app(url, monkeypatch):
    """As `python examples/gradio_app.py URL`, but for Gradio itself, of which a fake stands in."""
    gradio = FakeGradio()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr(sys, "argv", ["gradio_app.py", url])
    runpy.run_path(str(ROOT / "examples" / "gradio_app.py"), run_name="__main__")
    [(answer, [dropdown])] = gradio.launched
    assert dropdown.value == dropdown.choices[0] and dropdown.choices[1:] == ["pirate", "sql"]
    asked = "What is the capital of France?"
    texts = list(answer(asked, [], "pirate"))
    assert len(texts) > 2 and texts == sorted(texts, key=len) and texts[-1] == ANSWERS["pirate"]
    history = [
        {"role": "user", "content": [{"type": "text", "text": asked}]},
        {"role": "assistant", "content": texts[-1]},
    ]
    [*_, last] = answer("What colour is the sky?", history, "sql")
    assert last == "SELECT colour FROM things WHERE name = 'sky';"
