"""Base models in 4 bit by bitsandbytes, under adapters: token for token what transformers and PEFT say over them."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes")

from fakes.models import make_tiny_model
from quantised import held_against_peft, with_adapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    "dora": {"r": 4, "target_modules": ["k_proj", "o_proj", "gate_proj"], "use_dora": True},
    "ends": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs with products in bfloat16 the package's modules round to that, whatever their dtype."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def four_bit(path: Path, *, double: bool, kind: str = "nf4", **options: Any) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=config, device_map="cpu"
    ).eval()


WIDE = {"hidden_size": 128, "intermediate_size": 256}
"""A rank of two has whole blocks of 64 inputs."""


@pytest.mark.parametrize(
    ("impl", "ranks"), [("native", 1), ("native", 2), pytest.param("transformers", 1, marks=pytest.mark.slow)]
)
def test_quantised_while_it_is_loaded(tmp_path: Path, impl: str, ranks: int) -> None:
    make_tiny_model(tmp_path / "base", "qwen2", **(WIDE if ranks > 1 else {}))

    def base() -> Any:
        return four_bit(tmp_path / "base", double=True)

    models = {name: with_adapter(tmp_path / name, base, i, **c) for i, (name, c) in enumerate(ADAPTERS.items())}
    options = {"model_impl": impl, "quantization": "bitsandbytes", "tp_size": ranks}
    held_against_peft(tmp_path, {None: base(), **models}, 1e-4, **options)


@pytest.mark.parametrize(
    ("kind", "double", "ranks"),
    [
        ("nf4", True, 1),
        ("nf4", True, 2),
        pytest.param("nf4", False, 1, marks=pytest.mark.slow),
        pytest.param("fp4", False, 2, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_transformers(tmp_path: Path, kind: str, double: bool, ranks: int) -> None:
    """Some modules in 16 bit."""
    make_tiny_model(tmp_path / "plain", "llama", dtype="float32", **(WIDE if ranks > 1 else {}))
    skipped = ["lm_head", "model.layers.0.mlp", "layers.1.self_attn.k_proj"]
    four_bit(tmp_path / "plain", double=double, kind=kind, llm_int8_skip_modules=skipped).save_pretrained(
        tmp_path / "base"
    )

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, device_map="cpu").eval()

    config = ADAPTERS["plain"]
    models = {"plain": with_adapter(tmp_path / "plain-adapter", base, 0, **config)}
    (tmp_path / "plain").rename(tmp_path / "away")
    (tmp_path / "plain-adapter").rename(tmp_path / "plain")
    held_against_peft(tmp_path, {None: base(), **models}, 1e-4, tp_size=ranks)
