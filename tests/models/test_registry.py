"""Architectures by name."""

import pytest

from multilora.errors import ModelUnsupported
from multilora.models.registry import ARCHITECTURES, model_class


def test_every_name_is_its_class() -> None:
    for name, cls in ARCHITECTURES.items():
        assert cls.__name__ == name
        assert model_class({"architectures": [name]}) is cls


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, "Other"),
    ],
)
def test_refusal_names_it_and_what_is_supported(raw: dict[str, object], named: str) -> None:
    with pytest.raises(ModelUnsupported, match=named) as caught:
        model_class(raw)
    assert "Qwen3ForCausalLM" in caught.value.message
