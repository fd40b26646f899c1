"""Every causal LM that transformers can build is served with adapters as PEFT computes them, or refused by name.

The walk itself is `tests/support/walk.py`, its results are `tests/data/architectures.json`, from which the table of
docs/models.md is made. Some architectures are walked in every run, all of them in the slow tier.
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from architectures import architectures, tiny_config, tiny_model
from fakes.engine_driver import DEVICE, EngineDriver
from walk import compare_on_ranks, examine, make_adapter

from multilora.errors import AdapterError, ConfigError

ROOT = Path(__file__).parents[2]
RECORDED: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "architectures.json").read_text())
DATA: dict[str, dict[str, str]] = RECORDED["architectures"]
ALL = dict(architectures())
KNOWN = [name for name in ALL if name in DATA]
OTHER_VERSION = transformers.__version__ != RECORDED["transformers"]
"""transformers is not the one that the results are of: it knows other architectures and has other plans for ranks."""
OFTEN = (
    "Gemma3ForCausalLM",  # windows by layer, a scaled embedding, norms of heads
    "GPT2LMHeadModel",  # Conv1D, names that two modules of a layer share, learned positions
    "GptOssForCausalLM",  # sinks, experts with biases
    "MiniMaxM3VLForCausalLM",  # experts with a limit, beside a shared one whose modules have their names
    "Phi3ForCausalLM",  # fused qkv and gate_up
    "Cohere2ForCausalLM",  # layers without rotation, scaled logits
)
ON_RANKS = [name for name in KNOWN if DATA[name]["way"] == "transformers" and DATA[name]["ranks"][:3] == "all"]
OFTEN_ON_RANKS = (
    "Olmo2ForCausalLM",  # norms over all heads: attention is whole on every rank
    "DeepseekV2ForCausalLM",  # experts from three matrices each, shared ones, heads behind latent rows
    "GptOssForCausalLM",  # a plan of ours: experts with biases, gate and up interleaved; sinks
    *(["AriaTextForCausalLM", "GraniteMoeSWAForCausalLM"] if DEVICE == "cuda" else []),
)
"""The last two, which the slow tier has on a CPU: experts as [experts, in, out], gate above up; experts, sinks."""
MIXTURES = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
"""Those that are served natively."""
EXPECTED = (
    "Apertus",
    "Arcee",
    "Cohere",
    "Cohere2",
    "Exaone4",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "Glm4",
    "GPTNeoX",
    "GptOss",
    "Granite",
    "Llama",
    "Ministral",
    "Mistral",
    "Olmo2",
    "Olmo3",
    "Phi3",
    "Qwen2",
    "Qwen3",
    "SeedOss",
    "SmolLM3",
    "Starcoder2",
)


@pytest.fixture(autouse=True)
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in KNOWN]
)
def test_walk(name: str, tmp_path: Path) -> None:
    """If it is served otherwise than written: python scripts/architecture_table.py NAME"""
    found = examine(name, ALL[name], tmp_path)
    assert (found.way, found.reason) == (DATA[name]["way"], DATA[name]["reason"])
    assert OTHER_VERSION or found.ranks == DATA[name]["ranks"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN_ON_RANKS else pytest.mark.slow) for name in ON_RANKS]
)
def test_walk_on_ranks(name: str, tmp_path: Path) -> None:
    ranks = 4 if name == "Gemma3ForCausalLM" else 2
    if DEVICE == "cuda" and (count := torch.cuda.device_count()) < ranks:
        pytest.skip(f"needs {ranks} GPUs, here are {count}")
    try:
        compare_on_ranks(name, ALL[name], tmp_path, ranks)
    except ConfigError as e:
        if not OTHER_VERSION:
            raise
        pytest.skip(f"transformers {transformers.__version__}: {e.message}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KNOWN if DATA[name]["way"] == "native"])
def test_what_is_native_is_served_through_transformers_too(name: str, tmp_path: Path) -> None:
    assert examine(name, ALL[name], tmp_path, "transformers").way == "transformers"


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_native_mixtures_on_ranks_through_transformers(name: str, tmp_path: Path) -> None:
    if DEVICE == "cuda" and (count := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs 2 GPUs, here are {count}")
    compare_on_ranks(name, ALL[name], tmp_path, 2)


def test_limits_know_modules_that_share_a_name_by_it(tmp_path: Path) -> None:
    config = tiny_config("gpt2", "GPT2LMHeadModel")
    tiny_model("GPT2LMHeadModel", config).save_pretrained(tmp_path / "model")
    for seed, target in enumerate(("c_proj", "c_attn")):
        make_adapter(tmp_path / target, tmp_path / "model", seed, {"r": 2, "target_modules": [target]})
    driver = EngineDriver(tmp_path / "model", lora_target_modules=("c_proj",))
    driver.load("fits", tmp_path / "c_proj")
    assert driver.infos["fits"].target_modules == ["attn.c_proj", "mlp.c_proj"]
    with pytest.raises(AdapterError, match=r"targets c_attn, which --lora-target-modules c_proj does not allow"):
        driver.load("beyond", tmp_path / "c_attn")
    driver.close()
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no module 'q_proj'; it has .*attn\.c_proj"):
        EngineDriver(tmp_path / "model", lora_target_modules=("q_proj",))


def test_the_results_are_those_of_the_mapping() -> None:
    """If not: python scripts/architecture_table.py"""
    if OTHER_VERSION:
        pytest.skip(f"the results are of transformers {RECORDED['transformers']}, here is {transformers.__version__}")
    assert {name: entry["model_type"] for name, entry in DATA.items()} == ALL
    assert {entry["way"] for entry in DATA.values()} == {"native", "transformers", "refused"}
    assert all(bool(entry["reason"]) == (entry["way"] == "refused") for entry in DATA.values())


def test_what_people_fine_tune_is_served() -> None:
    served = {name for name, entry in DATA.items() if entry["way"] != "refused"}
    assert served >= {f"{name}ForCausalLM" for name in EXPECTED} | {"GPT2LMHeadModel"}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture_table", ROOT / "scripts" / "architecture_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documentation_has_the_table_of_these_results() -> None:
    """If not: python scripts/architecture_table.py --table"""
    table = script()
    assert table.written((ROOT / "docs" / "models.md").read_text()) == table.table(DATA)
