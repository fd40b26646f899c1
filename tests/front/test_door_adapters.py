"""Adapters through every door: loaded, refused, replaced, composed, unloaded, and nothing left of what failed.

Covers `adapter_manager.py`, `fetcher.py` too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import Door
from peft import LoraConfig
from safetensors.torch import load_file

from multilora.errors import (
    AdapterAlreadyLoaded,
    AdapterError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterNotLoaded,
    BadRequest,
    UnknownAdapter,
)

GREEDY = {"temperature": 0.0, "max_new_tokens": 6}
TEXT = "the cat and the dog, then the end."
PARTS = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": -1}]


@pytest.fixture(autouse=True)
def _left_as_it_was(door: Door) -> Any:
    before = door.loaded()
    yield
    assert door.loaded() == before
    assert [a.version for a in door.engine.stats.adapters] == [ref.version for ref in door.front.registry.refs()]
    assert not list(door.front.adapters.spool.root.iterdir())
    assert door.front.vocabularies._own == {}


def ask(door: Door, lora_path: Any) -> list[int]:
    return door.generate(TEXT, GREEDY, lora_path)[0].token_ids


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter at `path` as it would be in memory: PEFT's tensors and PEFT's config."""
    return load_file(path / "adapter_model.safetensors"), LoraConfig.from_pretrained(path).to_dict()


def test_load_and_unload(door: Door, door_files: Path) -> None:
    with pytest.raises(UnknownAdapter):
        ask(door, "x")
    door.load("x", door_files / "a")
    assert door.loaded()["x"] == str(door_files / "a")
    assert ask(door, "x") == ask(door, "a")
    door.unload("x")
    with pytest.raises(UnknownAdapter):
        ask(door, "x")
    with pytest.raises(AdapterNotLoaded):
        door.unload("x")
    door.load("x", door_files / "b")
    assert ask(door, "x") == ask(door, "b")
    door.unload("x")


REFUSED: dict[str, tuple[str, str, type[Exception], str]] = {
    "taken": ("a", "b", AdapterAlreadyLoaded, "already"),
    "nowhere": ("x", "nowhere", AdapterNotFound, "nowhere"),
    "no adapter": ("x", "model", AdapterError, "adapter_config.json"),
    "broken tokenizer": ("x", "broken", AdapterInvalid, "the tokenizer of the adapter cannot be loaded"),
    "no name": ("", "a", BadRequest, "1 to 256 characters"),
    "long name": ("x" * 257, "a", BadRequest, "1 to 256 characters"),
    "colon": ("x:y", "a", BadRequest, "':'"),
    "the base model's other name": ("default", "a", BadRequest, "base model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_load_that_fails_changes_nothing(door: Door, door_files: Path, case: str) -> None:
    name, path, error, says = REFUSED[case]
    with pytest.raises(error, match=says):
        door.load(name, door_files / path)
    assert ask(door, "a") != ask(door, "b")


def test_the_base_models_name_is_taken(door: Door, door_files: Path) -> None:
    base = door.front.registry.model_name
    with pytest.raises(BadRequest, match=r"base model|':'"):
        door.load(base, door_files / "a")


def test_replace(door: Door, door_files: Path) -> None:
    door.load("x", door_files / "a", pinned=True)
    old = ask(door, "x")
    with pytest.raises(AdapterNotFound):
        door.load("x", door_files / "nowhere", replace=True)
    assert ask(door, "x") == old
    door.load("x", door_files / "own", replace=True)
    assert door.loaded()["x"] == str(door_files / "own")
    assert ask(door, "x") != old
    door.load("x", door_files / "b", replace=True)
    assert ask(door, "x") == ask(door, "b")
    assert len(door.engine.stats.adapters) == 3, "the old versions are gone"
    door.unload("x")


def test_tokens_of_its_own(door: Door, door_files: Path) -> None:
    door.load("own", door_files / "own")
    own = door.front.vocabularies.of((("own", 1.0),)).tokenizer
    [answer] = door.generate("the<|call|>", GREEDY, "own")
    assert answer.prompt_tokens == len(own.encode("the<|call|>")) < len(own.encode("the")) + 3
    with pytest.raises(BadRequest, match="an adapter with tokens of its own"):
        door.generate(TEXT, GREEDY | {"regex": "a+"}, "own")
    door.unload("own")


def test_from_tensors(door: Door, door_files: Path) -> None:
    door.load_tensors("x", *tensors_of(door_files / "a"))
    assert door.loaded()["x"] == "__tensor__"
    assert ask(door, "x") == ask(door, "a")
    with pytest.raises(AdapterAlreadyLoaded):
        door.load_tensors("x", *tensors_of(door_files / "a")) if not is_http(door) else taken_over_http(door)
    assert len(list(door.front.adapters.spool.root.iterdir())) == 1
    door.load("x", door_files / "b", replace=True)
    assert not list(door.front.adapters.spool.root.iterdir())
    door.unload("x")


def is_http(door: Door) -> bool:
    return hasattr(door, "server")


def taken_over_http(door: Door) -> None:
    door.load("x", "/p")


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], tuple[Any, Any]]
BAD_TENSORS: dict[str, tuple[Change, str]] = {
    "dtype": (lambda t, c: ({n: v.int() for n, v in t.items()}, c), "dtype"),
    "not finite": (lambda t, c: ({n: v * torch.nan for n, v in t.items()}, c), "finite|NaN"),
    "left over": (lambda t, c: (t | {"x": next(iter(t.values())).clone()}, c), "left over"),
    "another rank": (lambda t, c: (t, c | {"r": 3}), "rank"),
    "no config": (lambda t, c: (t, {}), "peft_type"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_leave_nothing(door: Door, door_files: Path, case: str) -> None:
    change, says = BAD_TENSORS[case]
    with pytest.raises(AdapterError, match=says) as caught:
        door.load_tensors("x", *change(*tensors_of(door_files / "a")))
    assert str(door.front.adapters.spool.root) not in str(caught.value), "nobody is told where the file was"


def test_named_compositions(door: Door, door_files: Path) -> None:
    door.compose("mix", PARTS)
    assert door.loaded()["mix"] == "0.5 * a + -1 * b"
    assert ask(door, "mix") == ask(door, PARTS)
    with pytest.raises(AdapterAlreadyLoaded):
        door.compose("mix", PARTS[:1])
    door.compose("mix", PARTS[:1], replace=True)
    assert ask(door, "mix") == ask(door, PARTS[:1])
    with pytest.raises(AdapterError, match="part of composition 'mix'"):
        door.unload("a")
    door.unload("mix")
    for parts, says in ([{"name": "nope"}], "nope"), ([], "empty composition"), ([PARTS[0]] * 2, "comes twice"):
        with pytest.raises(BadRequest, match=says):
            door.compose("mix", parts)
