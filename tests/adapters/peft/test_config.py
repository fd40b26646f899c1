"""adapter_config.json: what is refused and how it is said; PEFT's matching rules against PEFT's own functions.

Covers `peft/fields.py`, `peft/match.py` too.
"""

import copy
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes.models import make_tiny_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper, _set_trainable, get_pattern_key

from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.config import parse_config
from multilora.adapters.peft.match import pattern_key
from multilora.errors import AdapterError, AdapterInvalid, AdapterUnsupported

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
PATH = Path("adapter_config.json")
DROP = object()
BASE = BaseModel((), (), vocab_size=10, hidden_size=8, tie_word_embeddings=False)
TIED = replace(BASE, tie_word_embeddings=True)

INVALID = {
    "r missing": ({"r": DROP}, "r:"),
    "r zero": ({"r": 0}, "r:"),
    "r negative": ({"r": -4}, "r:"),
    "r a string": ({"r": "8"}, "r:"),
    "r a float": ({"r": 8.0}, "r:"),
    "r a bool": ({"r": True}, "r:"),
    "alpha missing": ({"lora_alpha": DROP}, "lora_alpha:"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha:"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha:"),
    "alpha infinite": ({"lora_alpha": float("-inf")}, "lora_alpha:"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha:"),
    "alpha a list": ({"lora_alpha": [8]}, "lora_alpha:"),
    "peft_type missing": ({"peft_type": DROP}, "peft_type:"),
    "peft_type a number": ({"peft_type": 1}, "peft_type:"),
    "use_rslora a string": ({"use_rslora": "yes"}, "use_rslora:"),
    "use_rslora a number": ({"use_rslora": 1}, "use_rslora:"),
    "rank_pattern a list": ({"rank_pattern": [4]}, "rank_pattern:"),
    "rank_pattern zero": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']:"),
    "alpha_pattern null": ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern['q_proj']:"),
    "targets missing": ({"target_modules": DROP}, "target_modules:"),
    "targets empty": ({"target_modules": []}, "target_modules:"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules:"),
    "targets an object": ({"target_modules": {"q_proj": 1}}, "target_modules:"),
    "exclude a number": ({"exclude_modules": 3}, "exclude_modules:"),
    "layers strings": ({"layers_to_transform": ["0"]}, "layers_to_transform:"),
    "layers negative": ({"layers_to_transform": -1}, "layers_to_transform:"),
    "layers with regex": ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform:"),
    "pattern without layers": ({"layers_pattern": "layers"}, "layers_pattern:"),
    "bias unknown": ({"bias": "some"}, "bias:"),
    "bias a list": ({"bias": ["all"]}, "bias:"),
    "saved a string": ({"modules_to_save": "lm_head"}, "modules_to_save:"),
    "saved with an empty name": ({"modules_to_save": ["lm_head", ""]}, "modules_to_save:"),
    "tokens strings": ({"trainable_token_indices": ["a"]}, "trainable_token_indices:"),
    "tokens negative": ({"trainable_token_indices": [3, -1]}, "trainable_token_indices:"),
    "tokens twice": ({"trainable_token_indices": {"lm_head": [3, 3]}}, "trainable_token_indices['lm_head']: a token"),
    "tokens a number": ({"trainable_token_indices": {"lm_head": 3}}, "trainable_token_indices['lm_head']:"),
    "invocation a string": ({"alora_invocation_tokens": "[1]"}, "alora_invocation_tokens:"),
    "invocation with floats": ({"alora_invocation_tokens": [1.5]}, "alora_invocation_tokens:"),
    "DoRA and lora_bias": ({"use_dora": True, "lora_bias": True}, "lora_bias: cannot be combined with use_dora"),
    "DoRA and activated": (
        {"use_dora": True, "alora_invocation_tokens": [1]},
        "use_dora: cannot be combined with alora_invocation_tokens",
    ),
    "DoRA and MiCA": ({"use_dora": True, "init_lora_weights": "mica"}, "use_dora: cannot be combined with"),
}
UNSUPPORTED = {
    "layer_replication": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "QALoRA": ({"use_qalora": True}, "QALoRA"),
    "block diagonal": ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    "activated by a string": ({"alora_invocation_string": "<x>"}, "alora_invocation_string"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "Arrow"),
    "KaSA": ({"kasa_config": {"beta": 1}}, "KaSA"),
    "MonteCLoRA": ({"monteclora_config": {"n": 1}}, "MonteCLoRA"),
    "Megatron": ({"megatron_config": {"a": 1}}, "Megatron"),
    "merged layers": ({"enable_lora": [True, False, True]}, "enable_lora"),
    "another method": ({"peft_type": "IA3"}, "'IA3'"),
    "AdaLoRA": ({"peft_type": "ADALORA"}, "'ADALORA'"),
    "unknown field": ({"quantum_rank": 3}, "'quantum_rank'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "plain LoRA"),
    "CorDA": ({"init_lora_weights": "corda"}, "plain LoRA"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "plain LoRA"),
    "unknown init": ({"init_lora_weights": "magic"}, "init_lora_weights='magic'"),
    "init a number": ({"init_lora_weights": 1}, "init_lora_weights=1"),
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (PLAIN | changes).items() if value is not DROP}


@pytest.mark.parametrize("case", INVALID)
def test_invalid(case: str) -> None:
    changes, said = INVALID[case]
    with pytest.raises(AdapterInvalid) as caught:
        parse_config(changed(changes), PATH)
    assert "adapter_config.json" in caught.value.message
    assert said in caught.value.message
    assert len(caught.value.message) < 500


def test_parameters_that_peft_wraps() -> None:
    """Their names, or tails of them; patterns are held against the name of the parameter."""
    fields = {
        "target_parameters": ["experts.down_proj", "mlp.gate.weight"],
        "rank_pattern": {"gate.weight": 5},
        "alpha_pattern": {"experts.down_proj": 6},
    }
    config = parse_config(PLAIN | fields, PATH)
    layer = "model.layers.0.mlp"
    assert config.targets_parameter(f"{layer}.experts.down_proj")
    assert not config.targets_parameter(f"{layer}.experts.gate_up_proj")
    assert not config.targets_parameter(f"{layer}.more_experts.down_proj")
    assert config.targets(f"{layer}.gate", BASE)
    assert config.rank(f"{layer}.gate") == 5
    assert config.scaling(f"{layer}.experts.down_proj", 3) == 2.0


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_is_refused_by_name(case: str) -> None:
    changes, said = UNSUPPORTED[case]
    with pytest.raises(AdapterUnsupported) as caught:
        parse_config(changed(changes), PATH)
    assert "adapter_config.json" in caught.value.message
    assert said in caught.value.message


@pytest.mark.parametrize("pattern", ["[", "(?P<a>x", "*", "a{1000000000000000000000}"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_a_broken_regular_expression_names_its_field(field: str, pattern: str) -> None:
    value = {pattern: 4} if field.endswith("_pattern") else pattern
    config = parse_config(changed({field: value}), PATH)
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(AdapterInvalid, match=f"adapter_config.json: .*{field}"):
        [config.targets(name, BASE), config.rank(name), config.scaling(name, rank=4)]


def test_a_regular_expression_cannot_hold_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multilora.adapters.peft.match.MATCH_SECONDS", 0.05)
    config = parse_config(changed({"rank_pattern": {"((a|aa)+)+!": 4}}), PATH)
    start = time.monotonic()
    with pytest.raises(AdapterInvalid, match=r"rank_pattern: .*too long"):
        config.rank("model.layers.0." + "a" * 60 + ".q_proj")
    assert time.monotonic() - start < 5


NAMES = [
    f"{prefix}layers.{layer}.{module}"
    for prefix in ("model.", "", "model.language_model.")
    for layer in (0, 1, 11)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.experts.3.up_proj")
]


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj"],
        ["proj", "_proj", ".*q_proj", "k_proj"],
        ["^model.layers.1.self_attn.q_proj", "layers.1"],
        [r"model\.layers\.\d\..*", "1.mlp.gate_proj", "layers.1.mlp.gate_proj"],
        ["q_proj|gate_proj", "q_proj)|(k_proj", "$", ""],
        ["self_attn", "self_attn.*", r"\d+.self_attn.(q|k)_proj"],
    ],
)
def test_pattern_key_is_peft_s(patterns: list[str]) -> None:
    for name in NAMES:
        theirs = get_pattern_key(patterns, name)
        assert pattern_key(patterns, name) == (theirs if theirs in patterns else None), name


@pytest.mark.parametrize(
    "rule",
    [
        {"target_modules": ["q_proj", "mlp.gate_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj"], "layers_to_transform": [0]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": "(?i).*Q_PROJ"},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 11], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 11], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["up_proj"], "layers_to_transform": [3], "layers_pattern": ["experts"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["self_attn.q_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r"model\..*"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": []},
    ],
)
def test_targets_is_peft_s(rule: dict[str, Any]) -> None:
    config = parse_config(changed(rule), PATH)
    fields = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "target_parameters": None}
    peft = SimpleNamespace(**(fields | rule))
    for name in NAMES:
        theirs = check_target_module_exists(peft, name)
        excluded = type(theirs).__name__ == "_ExcludedModule"
        assert config.targets(name, BASE) == (bool(theirs) and not excluded), name


def test_errors_stay_short_and_encodable() -> None:
    for config in ({"weird\ud800": "x" * 10_000}, {"r": "\ud800" * 10_000}):
        with pytest.raises(AdapterError) as caught:
            parse_config(changed(config), PATH)
        assert len(caught.value.message.encode()) < 1000


@pytest.mark.parametrize(
    "entries", [["norm"], ["lm_head"], ["head"], ["layers.1"], ["mlp", "q_proj"], ["model.embed_tokens"]]
)
def test_saves_is_peft_s(entries: list[str], saved_model: torch.nn.Module) -> None:
    """PEFT wraps whatever ends so; here the wrapped modules are asked for by every parameter's module."""
    model = copy.deepcopy(saved_model)
    names = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
    _set_trainable(model, "default", module_names=entries, inference_mode=True)
    wrapped = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    config = parse_config(changed({"modules_to_save": entries}), PATH)
    for name in names:
        theirs = any(name == n or name.startswith(f"{n}.") for n in wrapped)
        assert config.saves(name, BASE) == theirs, name


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.mark.parametrize("entries", [["lm_head"], ["mlp"], ["q_proj", "layers.1"], ["o.*"], ["proj"]])
def test_saved_modules_take_no_lora(entries: list[str]) -> None:
    rule = {"target_modules": ["q_proj", "k_proj", "gate_proj", "lm_head"], "modules_to_save": entries}
    config = parse_config(changed(rule), PATH)
    nothing = {
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_parameters": None,
    }
    peft = SimpleNamespace(**nothing | rule)
    for name in [*NAMES, "lm_head"]:
        theirs = check_target_module_exists(peft, name)
        excluded = type(theirs).__name__ == "_ExcludedModule"
        assert config.targets(name, BASE) == (bool(theirs) and not excluded), name


def test_all_linear_leaves_the_tables_out() -> None:
    config = parse_config(changed({"target_modules": "all-linear"}), PATH)
    assert config.targets("model.layers.0.mlp.up_proj", BASE)
    assert not config.targets("lm_head", BASE)
    assert not config.targets("model.embed_tokens", BASE)


def test_ensured_ties_need_a_tied_model() -> None:
    saved = parse_config(changed({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}), PATH)
    assert saved.saves("model.embed_tokens", TIED) and not saved.saves("model.embed_tokens", BASE)
    for targets in (["embed_tokens", "q_proj"], ".*(lm_head|q_proj)"):
        lora = parse_config(changed({"target_modules": targets, "ensure_weight_tying": True}), PATH)
        assert lora.targets("lm_head", TIED) and lora.targets("model.embed_tokens", TIED)
        assert lora.targets("lm_head", BASE) != lora.targets("model.embed_tokens", BASE)
    other = parse_config(changed({"target_modules": ["q_proj"], "ensure_weight_tying": True}), PATH)
    assert not other.targets("lm_head", TIED)


def test_tokens_by_module() -> None:
    config = parse_config(changed({"trainable_token_indices": [5, 2]}), PATH)
    assert config.tokens(BASE) == {"embed_tokens": (5, 2)}
    assert config.ties_tokens(TIED) and not config.ties_tokens(BASE)
    both = {"model.embed_tokens": [5, 2], "lm_head": [5, 2]}
    assert parse_config(changed({"trainable_token_indices": both}), PATH).ties_tokens(TIED)
    both["lm_head"] = [2]
    config = parse_config(changed({"trainable_token_indices": both}), PATH)
    assert config.tokens(TIED) == {"embed_tokens": (5, 2), "lm_head": (2,)} and not config.ties_tokens(TIED)
    assert not parse_config(changed({"trainable_token_indices": {"lm_head": [2]}}), PATH).ties_tokens(TIED)
    twice = parse_config(changed({"trainable_token_indices": {"embed_tokens": [1], "model.embed_tokens": [2]}}), PATH)
    with pytest.raises(AdapterInvalid, match="embed_tokens is given twice"):
        twice.tokens(BASE)
