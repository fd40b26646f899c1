"""The resolver through every door, with a real engine: what is named and lies in its directory answers.

Covers `resolver.py` too.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from doors import DOORS, ROWS, Door

from multilora.errors import AdapterInvalid, UnknownAdapter

GREEDY = {"temperature": 0.0, "max_new_tokens": 6}
TEXT = "the cat and the dog, then the end."


@pytest.fixture(scope="module", params=DOORS)
def resolving(request: pytest.FixtureRequest, door_files: Path) -> Iterator[Door]:
    """A door whose resolver looks into `door_files`; at most two adapters at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = {"lora_paths": {"loaded": str(door_files / "a")}, "device": "cpu", "max_total_tokens": 4096}
    found = {"lora_resolver_dir": str(door_files), "max_resolved_loras": 2}
    door = DOORS[request.param](door_files / "model", **options, **found)
    yield door
    assert len(list(door.front.adapters.spool.root.iterdir())) == len(door.loaded()) - 1
    door.close()
    torch.set_num_threads(threads)


def ask(door: Door, lora_path: object) -> list[int]:
    return door.generate(TEXT, GREEDY, lora_path)[0].token_ids


def test_what_is_named_is_loaded_and_answers_as_if_it_had_been(resolving: Door, door_files: Path) -> None:
    assert ask(resolving, "a") == ask(resolving, "loaded")
    assert resolving.loaded()["a"] == str(door_files / "a")
    assert ask(resolving, "b") != ask(resolving, "a")
    mix = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": -1}]
    assert ask(resolving, mix) == ask(resolving, [{"name": "loaded", "weight": 0.5}, {"name": "b", "weight": -1}])


def test_its_own_tokens_come_with_it(resolving: Door) -> None:
    [answer] = resolving.generate([[5, ROWS + 1]], GREEDY, "own")
    assert answer.prompt_tokens == 2
    vocabulary = resolving.front.vocabularies.of((("own", 1.0),))
    assert vocabulary.own
    assert vocabulary.tokenizer is not resolving.front.vocabularies.base.tokenizer


def test_the_quota_and_coming_back(resolving: Door) -> None:
    first = [ask(resolving, name) for name in ("a", "b")]
    ask(resolving, "own")
    assert sorted(resolving.loaded()) == ["b", "loaded", "own"]
    assert [ask(resolving, name) for name in ("a", "b")] == first
    assert sorted(resolving.loaded()) == ["a", "b", "loaded"]


def test_what_is_not_there_or_broken(resolving: Door, door_files: Path) -> None:
    before = resolving.loaded()
    for name in ("nope", "../a", "model", str(door_files / "a"), "a/.."):
        with pytest.raises(UnknownAdapter, match="never been loaded"):
            ask(resolving, name)
    ask(resolving, "own")
    with pytest.raises(AdapterInvalid) as error:
        ask(resolving, "broken")
    assert str(resolving.front.adapters.spool.root) not in error.value.message
    assert before.keys() >= {"loaded"} <= resolving.loaded().keys()


def test_an_unloaded_one_is_loaded_again_when_it_is_named(resolving: Door) -> None:
    first = ask(resolving, "a")
    resolving.unload("a")
    assert "a" not in resolving.loaded()
    assert ask(resolving, "a") == first
