"""The reader against PEFT itself: every block's A and B give PEFT's own delta weight."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from multilora.adapters.adapter import Adapter, AdapterLimits
from multilora.adapters.peft import checkpoint
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.checkpoint import fingerprint, read_adapter
from multilora.adapters.thread_pool import ReaderPool
from multilora.errors import AdapterIncompatible, AdapterInvalid
from multilora.lora.sites import LoraSite, LoraSlice

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
NO_LIMITS = AdapterLimits()

# what is special → (LoraConfig, dtype of the file)
GRID: dict[str, tuple[dict[str, Any], str]] = {
    "all seven": ({"r": 8, "lora_alpha": 16, "target_modules": ATTENTION + MLP}, "float32"),
    "rank 1": ({"r": 1, "lora_alpha": 3, "target_modules": ["v_proj"]}, "float32"),
    "rank over the width": ({"r": 70, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}, "float32"),
    "q without v": ({"r": 3, "lora_alpha": 1, "target_modules": ["q_proj"]}, "float32"),
    "gate without up": ({"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "k_proj"]}, "float32"),
    "all-linear": ({"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}, "float32"),
    "regex targets": ({"r": 2, "target_modules": r"model\.layers\.[12]\..*(q_proj|up_proj)"}, "float32"),
    "full name target": ({"r": 2, "target_modules": ["model.layers.1.self_attn.o_proj", "0.mlp.up_proj"]}, "float32"),
    "rslora": ({"r": 16, "lora_alpha": 7, "use_rslora": True, "target_modules": ATTENTION}, "float32"),
    "negative alpha": ({"r": 4, "lora_alpha": -3, "target_modules": ["o_proj"]}, "float32"),
    "alpha zero": ({"r": 4, "lora_alpha": 0, "target_modules": ["o_proj"]}, "float32"),
    "fractional alpha": ({"r": 3, "lora_alpha": 0.7, "target_modules": ["o_proj"]}, "float32"),
    "rank_pattern by module": ({"r": 4, "target_modules": ATTENTION, "rank_pattern": {"k_proj": 6}}, "float32"),
    "patterns by tail and regex": (  # in sorted order, which is how PEFT saves them, and the first match counts
        {
            "r": 4,
            "lora_alpha": 9,
            "target_modules": ATTENTION + MLP,
            "rank_pattern": {"1.mlp.up_proj": 7, "^model.layers.1.mlp.*": 2, r"layers\.[02]\.self_attn\..*": 5},
            "alpha_pattern": {r".*\.2\.mlp\.gate_proj": 0.5, "self_attn.(q|v)_proj": 11, "v_proj": 13},
        },
        "float32",
    ),
    "patterns that match nothing": (
        {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"proj": 9, "x.q_proj": 9}, "alpha_pattern": {"q": 1}},
        "float32",
    ),
    "patterns with rslora": (
        {
            "r": 4,
            "lora_alpha": 9,
            "use_rslora": True,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 11},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 2},
        },
        "float32",
    ),
    "layers_to_transform": ({"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, "float32"),
    "one layer, with pattern": (
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        "float32",
    ),
    "excluded": (
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
        "float32",
    ),
    "excluded by regex": ({"r": 2, "target_modules": "all-linear", "exclude_modules": r".*\.(1|2)\..*"}, "float32"),
    "fan_in_fan_out": ({"r": 4, "lora_alpha": 6, "fan_in_fan_out": True, "target_modules": MLP}, "float32"),
    "bfloat16": ({"r": 5, "lora_alpha": 7, "target_modules": ATTENTION + MLP}, "bfloat16"),
    "float16": ({"r": 5, "lora_alpha": 7, "target_modules": ATTENTION + MLP}, "float16"),
    "gaussian": ({"r": 4, "init_lora_weights": "gaussian", "target_modules": ["q_proj"]}, "float32"),
    "orthogonal": ({"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]}, "float32"),
    "of the training only": (
        {"r": 4, "lora_dropout": 0.3, "task_type": "CAUSAL_LM", "revision": "main", "target_modules": ["q_proj"]},
        "float32",
    ),
}


def tiny_sites(layers: int = 3, hidden: int = 64, kv: int = 32, mlp: int = 96) -> tuple[LoraSite, ...]:
    shapes = {
        "qkv_proj": ("self_attn", hidden, {"q_proj": hidden, "k_proj": kv, "v_proj": kv}),
        "o_proj": ("self_attn", hidden, {"o_proj": hidden}),
        "gate_up_proj": ("mlp", hidden, {"gate_proj": mlp, "up_proj": mlp}),
        "down_proj": ("mlp", mlp, {"down_proj": hidden}),
    }
    sites = []
    for layer in range(layers):
        for name, (parent, width, outs) in shapes.items():
            offsets = [sum(list(outs.values())[:i]) for i in range(len(outs))]
            parts = zip(outs.items(), offsets, strict=True)
            slices = tuple(LoraSlice(m, offset, out, parent) for (m, out), offset in parts)
            sites.append(LoraSite(len(sites), layer, name, width, slices))
    return tuple(sites)


BASE = BaseModel(tiny_sites(), (), vocab_size=101, hidden_size=64, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(path, num_hidden_layers=3)
    return path


@pytest.fixture(scope="module")
def plain(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter that several tests rewrite into other forms."""
    path = tmp_path_factory.mktemp("plain")
    make_adapter(path, model_path, r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    return path


def peft_deltas(model: PeftModel) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, module) → PEFT's own delta weight, [out, in]."""
    deltas = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            parts = name.split(".")
            deltas[int(parts[-3]), parts[-1]] = module.get_delta_weight("default").detach()
    return deltas


def deltas(adapter: Adapter) -> dict[tuple[int, str], torch.Tensor]:
    """scaling · BA, in fp32."""
    return {
        (block.layer, block.module): (block.a.float().T @ block.b.float()).T * block.scaling
        for block in adapter.blocks
    }


def assert_same(mine: Adapter, other: dict[tuple[int, str], torch.Tensor]) -> None:
    found = deltas(mine)
    assert found.keys() == other.keys()
    for key, delta in found.items():
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta, other[key], rtol=1e-6, atol=1e-6 * max(1.0, float(other[key].abs().max())))


def rewrite(source: Path, target: Path, rename: dict[str, str] | None = None, **config: Any) -> Path:
    """A copy of an adapter, with every `old` in its tensor names made `new` and config fields replaced."""
    target.mkdir(exist_ok=True)
    fields = json.loads((source / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {}
    for name, tensor in load_file(source / "adapter_model.safetensors").items():
        for old, new in (rename or {}).items():
            name = name.replace(old, new)
        tensors[name] = tensor
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def test_null_targets_are_the_modules_with_tensors(plain: Path, tmp_path: Path) -> None:
    """As trainers other than PEFT write it."""
    adapter = read_adapter(rewrite(plain, tmp_path / "null", target_modules=None), BASE, NO_LIMITS)
    assert_same(adapter, deltas(read_adapter(plain, BASE, NO_LIMITS)))
    assert adapter.target_modules == ["q_proj", "up_proj"]
    rename = {"mlp.up_proj": "mlp.any_proj"}
    with pytest.raises(AdapterIncompatible, match="any_proj"):
        read_adapter(rewrite(plain, tmp_path / "other", rename, target_modules=None), BASE, NO_LIMITS)


@pytest.mark.parametrize("case", GRID)
def test_equals_peft(case: str, model_path: Path, tmp_path: Path) -> None:
    config, dtype = GRID[case]
    made = peft_deltas(make_adapter(tmp_path, model_path, dtype=dtype, **config))
    assert made
    assert_same(read_adapter(tmp_path, BASE, NO_LIMITS), made)


@pytest.mark.parametrize("case", ["patterns by tail and regex", "patterns with rslora", "layers_to_transform"])
def test_equals_peft_loading_the_same_directory(case: str, model_path: Path, tmp_path: Path) -> None:
    """The directory, not the model that wrote it, is the standard: the file's patterns are in sorted order."""
    make_adapter(tmp_path, model_path, **GRID[case][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), str(tmp_path))
    assert_same(read_adapter(tmp_path, BASE, NO_LIMITS), peft_deltas(loaded))


def test_fan_in_fan_out_in_the_file_changes_nothing(plain: Path, tmp_path: Path) -> None:
    """PEFT sets it to false for every nn.Linear, whatever the file says."""
    path = rewrite(plain, tmp_path / "a", fan_in_fan_out=True)
    assert_same(read_adapter(path, BASE, NO_LIMITS), deltas(read_adapter(plain, BASE, NO_LIMITS)))


@pytest.mark.parametrize(
    "rename",
    [
        {"base_model.model.": ""},
        {"lora_A.weight": "lora_A.default.weight", "lora_B.weight": "lora_B.default.weight"},
        {"base_model.model.": "", "lora_A.weight": "lora_A.mine.weight", "lora_B.weight": "lora_B.mine.weight"},
        {"base_model.model.model.": "base_model.model."},  # trained on the model without its head
    ],
    ids=["no prefix", "adapter name", "both", "inner model"],
)
def test_other_spellings_of_tensor_names(rename: dict[str, str], plain: Path, tmp_path: Path) -> None:
    path = rewrite(plain, tmp_path / "a", rename)
    assert_same(read_adapter(path, BASE, NO_LIMITS), deltas(read_adapter(plain, BASE, NO_LIMITS)))


def test_sharded(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "adapter_model.safetensors")
    names = sorted(tensors)
    shards = {f"adapter_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    assert_same(read_adapter(tmp_path, BASE, NO_LIMITS), deltas(read_adapter(plain, BASE, NO_LIMITS)))

    index["weight_map"].pop(names[0])
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AdapterInvalid, match="index disagree"):
        read_adapter(tmp_path, BASE, NO_LIMITS)


def test_blocks_are_in_order_and_own_their_memory(model_path: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path, model_path, r=2, target_modules="all-linear")
    adapter = read_adapter(tmp_path, BASE, NO_LIMITS)
    assert [(b.layer, b.module) for b in adapter.blocks] == [(n, m) for n in range(3) for m in ATTENTION + MLP]
    weights = tmp_path / "adapter_model.safetensors"
    before = [block.a.clone() for block in adapter.blocks]
    weights.write_bytes(b"\xff" * weights.stat().st_size)  # in place, where a memory map would see it
    assert all(torch.equal(a, block.a) for a, block in zip(before, adapter.blocks, strict=True))


def test_a_config_of_old_peft(plain: Path, tmp_path: Path) -> None:
    path = rewrite(plain, tmp_path / "a")
    old = {
        "auto_mapping": None,
        "base_model_name_or_path": "x",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "revision": None,
        "target_modules": ["q_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(old))
    assert_same(read_adapter(path, BASE, NO_LIMITS), deltas(read_adapter(plain, BASE, NO_LIMITS)))


def test_harmless_and_empty_unknown_fields(plain: Path, tmp_path: Path) -> None:
    fields = {
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2.0},
        "corda_config": {},
        "runtime_config": {"ephemeral_gpu_offload": True},
        "auto_mapping": {"base_model_class": "X"},
        "future_switch": False,
        "future_list": [],
        "future_thing": None,
        "lora_bias": False,
    }
    path = rewrite(plain, tmp_path / "a", **fields)
    assert_same(read_adapter(path, BASE, NO_LIMITS), deltas(read_adapter(plain, BASE, NO_LIMITS)))


def test_every_field_of_the_installed_peft_is_in_one_list() -> None:
    import dataclasses

    from peft import LoraConfig

    from multilora.adapters.peft.fields import HARMLESS, REFUSED, USED

    lists = [USED, HARMLESS, frozenset(REFUSED)]
    for name in [field.name for field in dataclasses.fields(LoraConfig)]:
        assert sum(name in fields for fields in lists) == 1, name


def test_limits(plain: Path) -> None:
    read_adapter(plain, BASE, AdapterLimits(max_rank=4, target_modules=("q_proj", "up_proj", "v_proj")))
    with pytest.raises(AdapterIncompatible, match=r"incompatible.*rank 4.*--max-lora-rank 3"):
        read_adapter(plain, BASE, AdapterLimits(max_rank=3))
    with pytest.raises(AdapterIncompatible, match=r"incompatible.*up_proj.*--lora-target-modules q_proj"):
        read_adapter(plain, BASE, AdapterLimits(target_modules=("q_proj",)))


def test_reading_on_threads_finds_the_same(plain: Path) -> None:
    alone, on_threads = (read_adapter(plain, BASE, NO_LIMITS, readers) for readers in (ReaderPool(1), ReaderPool(3)))
    assert alone.fingerprint == on_threads.fingerprint
    assert alone.rank == on_threads.rank and len(alone.blocks) == len(on_threads.blocks)


def test_what_is_refused_by_its_headers_is_not_read(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "fingerprint", lambda *_: pytest.fail("it is digested"))
    with pytest.raises(AdapterIncompatible, match="rank"):
        read_adapter(plain, BASE, AdapterLimits(max_rank=1))


def test_an_error_of_the_digest_is_the_readers(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise OSError("a broken disk")

    monkeypatch.setattr(checkpoint, "fingerprint", broken)
    for readers in (ReaderPool(1), ReaderPool(3)):
        with pytest.raises(OSError, match="a broken disk"):
            read_adapter(plain, BASE, NO_LIMITS, readers)


def test_fingerprint_changes_with_the_files(plain: Path, tmp_path: Path) -> None:
    path = rewrite(plain, tmp_path / "a")
    first = fingerprint(path)
    assert fingerprint(path) == first == read_adapter(path, BASE, NO_LIMITS).fingerprint
    rewrite(plain, path, lora_alpha=7)
    second = fingerprint(path)
    assert second != first
    weights = path / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    (path / "unread.txt").write_text("x")
    weights.write_bytes(data[:-1] + b"\x01")
    assert fingerprint(path) != second
