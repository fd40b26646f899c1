"""Architectures by name."""

import subprocess
import sys

import pytest

from multilora.errors import ModelUnsupported
from multilora.models.registry import ARCHITECTURES, model_classes
from multilora.models.transformers_backend.model import TransformersCausalLM


def test_every_name_is_its_class() -> None:
    for name, cls in ARCHITECTURES.items():
        assert cls.__name__ == name
        assert [*model_classes({"architectures": [name]}, "native")] == [cls]


def test_auto_prefers_native_and_transformers_is_the_other_one() -> None:
    for name, cls in ARCHITECTURES.items():
        assert [*model_classes({"architectures": [name]}, "auto")] == [cls, TransformersCausalLM]
        assert [*model_classes({"architectures": [name]}, "transformers")] == [TransformersCausalLM]
    assert [*model_classes({"architectures": ["OtherForCausalLM"]}, "auto")] == [TransformersCausalLM]


@pytest.mark.slow
def test_transformers_modules_are_imported_for_those_who_need_them() -> None:
    """It would take every engine's start a second and more."""
    wanted = "multilora.models.transformers_backend.model", "torch._dynamo", "sympy"
    code = f"import sys, multilora.engine.process.worker; sys.exit(any(name in sys.modules for name in {wanted}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, "Other"),
    ],
)
def test_native_names_what_it_refuses_and_what_is_supported(raw: dict[str, object], named: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"--model-impl native: .*{named}") as caught:
        model_classes(raw, "native")
    assert "Qwen3ForCausalLM" in caught.value.message
