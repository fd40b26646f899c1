"""Every example of the cookbook, run as a person runs it, against the bundled model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
