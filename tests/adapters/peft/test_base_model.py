"""What adapters know of a base model, against transformers' own modules."""

from pathlib import Path

import msgspec
import pytest
import torch
from fakes.models import FAMILIES, make_tiny_model

from multilora.adapters.peft.base_model import SCORE_PLACE, BaseModel
from multilora.lora.sites import SCORE
from multilora.models.load import make_model

META = torch.device("meta")


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_the_modules_with_parameters(family: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, family)
    base = BaseModel.of(make_model(str(tmp_path), device=META), None)
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    own = {name: place for name, place in base.places.items() if name != SCORE}  # which adapters may bring
    assert base.places[SCORE] == SCORE_PLACE
    assert {f"{name}.weight" for name in own} == {name for name in parameters if name.endswith(".weight")}
    for name, place in own.items():
        assert base.paths[place] == name
        assert (place.module in base.biased) == (f"{name}.bias" in parameters)
        shape = parameters[f"{name}.weight"]
        if place.module in base.norm_sizes:
            assert shape == (base.norm_sizes[place.module],)
        elif place.module == "embed_tokens":
            assert shape == base.shapes[place.module]
        else:
            assert shape == base.shapes[place.module][::-1]


def test_it_can_travel(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "qwen3")
    base = BaseModel.of(make_model(str(tmp_path), device=META), "somewhere")
    assert base.places  # what is cached does not travel
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(base), type=BaseModel) == base
