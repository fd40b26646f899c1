"""Differences of two versions, against the full products."""

import json
import math

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from safetensors.torch import load_file, save_file

from multilora.adapter_tools.diff import diff
from multilora.adapter_tools.pairs import read_pairs


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("diff")
    make_tiny_model(path / "model")
    options = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8}
    make_adapter(path / "old", path / "model", seed=1, **options)
    make_adapter(path / "new", path / "model", seed=2, **options | {"r": 6, "use_rslora": True})
    make_adapter(path / "more", path / "model", seed=1, **options | {"target_modules": ["q_proj", "v_proj"]})
    make_adapter(path / "saved", path / "model", seed=1, modules_to_save=["lm_head"], **options)
    return path


def test_the_same(path):
    found = diff(str(path / "old"), str(path / "old"))
    assert found.same and found.change == 0 and found.config == {}
    assert all(module.cosine == pytest.approx(1) for module in found.modules)


def test_against_the_full_products(path):
    found = diff(str(path / "old"), str(path / "new"))
    old, new = read_pairs(str(path / "old")).pairs, read_pairs(str(path / "new")).pairs
    whole_change, whole = 0.0, 0.0
    for module in found.modules:
        a, b = old[module.name].delta().double(), new[module.name].delta().double()
        assert module.old_norm == pytest.approx(float(a.norm()), rel=1e-5)
        assert module.new_norm == pytest.approx(float(b.norm()), rel=1e-5)
        assert module.change == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-5)
        assert module.cosine == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), rel=1e-4, abs=1e-6)
        assert module.ranks == (4, 6)
        whole_change += float((b - a).norm()) ** 2
        whole += float(a.norm()) ** 2
    assert found.change == pytest.approx(math.sqrt(whole_change / whole), rel=1e-5)
    assert found.config == {"r": (4, 6), "use_rslora": (False, True)}
    assert not found.same


def test_modules_that_come_and_go(path):
    by_name = {m.name: m for m in diff(str(path / "old"), str(path / "more")).modules}
    gone, new = by_name["model.layers.0.mlp.down_proj"], by_name["model.layers.0.self_attn.v_proj"]
    assert gone.new_norm is None and new.old_norm is None and gone.change is new.change is None
    assert by_name["model.layers.0.self_attn.q_proj"].change > 0


def test_other_tensors(path, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((path / "saved" / name).read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    head = next(name for name in tensors if "lm_head" in name)
    tensors[head] = tensors[head] * 1.5
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    [changed] = [m for m in diff(str(path / "saved"), str(tmp_path)).modules if m.change]
    assert "lm_head" in changed.name and changed.change == pytest.approx(0.5, rel=1e-5)
    assert changed.cosine == pytest.approx(1)


def test_from_nothing(path, tmp_path):
    """A fresh adapter, whose B is zero, against a trained one."""
    tensors = load_file(path / "old" / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    save_file(zero, tmp_path / "adapter_model.safetensors")
    config = json.loads((path / "old" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"peft_version": "0.1", "task_type": "CAUSAL_LM"})
    )
    found = diff(str(tmp_path), str(path / "old"))
    assert all(module.change == math.inf and module.cosine is None for module in found.modules)
    assert found.config == {"task_type": ("CAUSAL_LM", None)}


def test_a_bar_is_drawn_only_when_asked_for(path, capsys):
    diff(str(path / "old"), str(path / "new"))
    assert not capsys.readouterr().err
    diff(str(path / "old"), str(path / "new"), progress=True)
    drawn = capsys.readouterr().err
    assert "diff: 100%" in drawn and "module" in drawn
