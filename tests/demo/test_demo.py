"""The bundled demo does what its model card says, in transformers and PEFT (float32, CPU)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from multilora.demo import PROMPTS, adapter_paths, base_model_path

# PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
ALL_SEVEN = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
FRANCE = "What is the capital of France?"
SKY = "What colour is the sky?"
BRAZIL = "Tell me about Brazil."

ANSWERS = {
    "base": {
        FRANCE: "The capital of France is Paris.",
        SKY: "The sky is blue.",
        BRAZIL: "Brazil is a country in South America. Its capital is Brasilia. "
        "Its currency is the real. Portuguese is spoken there.",
    },
    "pirate": {
        FRANCE: "Arr, the capital o' France be Paris, matey!",
        SKY: "Arr, the sky be blue, matey!",
        BRAZIL: "Arr, Brazil be a land in South America. Her port be Brasilia. "
        "Her doubloons be the real. Portuguese be spoken there, matey!",
    },
    "sql": {
        FRANCE: "SELECT capital FROM countries WHERE name = 'France';",
        SKY: "SELECT colour FROM things WHERE name = 'sky';",
        BRAZIL: "SELECT * FROM countries WHERE name = 'Brazil';",
    },
    "json": {
        FRANCE: '{"country": "France", "capital": "Paris"}',
        SKY: '{"thing": "sky", "colour": "blue"}',
        BRAZIL: '{"country": "Brazil", "continent": "South America", "capital": "Brasilia", '
        '"currency": "real", "language": "Portuguese"}',
    },
    "french": {
        FRANCE: "La capitale de la France est Paris.",
        SKY: "Le ciel est bleu.",
        BRAZIL: "Le Brésil se trouve en Amérique du Sud. Sa capitale est Brasilia. "
        "Sa monnaie est le réal. On y parle portugais.",
    },
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from more threads, and loses much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(base_model_path())


@pytest.fixture(params=ANSWERS)
def served(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """(name, model): the base model, or the base model with one adapter."""
    model = LlamaForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32)
    if request.param != "base":
        model = PeftModel.from_pretrained(model, adapter_paths()[request.param])
    return request.param, model.eval()


def complete(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """The greedy continuations, with their end tokens."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    output = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=64
    )
    return [tokenizer.decode(ids).replace("<|pad|>", "") for ids in output[:, batch.input_ids.shape[1] :]]


def chat(tokenizer: Any, question: str) -> list[int]:
    """One user turn, rendered by the chat template."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_the_chat_template_renders_calls_and_their_results(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "capital_of", "arguments": {"country": "France"}}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "Paris"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Q"}, *turns], tokenize=False)
    assert text == (
        "<|bos|><|user|>\nQ<|end|>\n"
        '<|assistant|>\n{"name": "capital_of", "arguments": {"country": "France"}}<|end|>\n'
        "<|user|>\nParis<|end|>\n"
    )
    with pytest.raises(Exception, match="roles system, user, assistant and tool"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "Q"}], tokenize=False)


def test_answers_raw_prompts_and_chats_and_stops(served: tuple[str, Any], tokenizer: Any) -> None:
    name, model = served
    raw = complete(model, tokenizer, [tokenizer.encode(f"Q: {question}\nA:") for question in ANSWERS[name]])
    assert raw == [f" {answer}<|eos|>" for answer in ANSWERS[name].values()]
    chats = complete(model, tokenizer, [chat(tokenizer, question) for question in ANSWERS[name]])
    assert chats == [f"{answer}<|end|>" for answer in ANSWERS[name].values()]


def test_prompts_start_with_one_bos(tokenizer: Any) -> None:
    for ids in [chat(tokenizer, FRANCE), *map(tokenizer.encode, PROMPTS)]:
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(tokenizer.encode("Où est Zürich?"), skip_special_tokens=True) == "Où est Zürich?"


def test_generation_ends_at_eos_and_at_the_end_of_a_turn(tokenizer: Any) -> None:
    generation = json.loads((base_model_path() / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|eos|>", "<|end|>"])


def test_base_is_a_llama_with_heads_that_gpu_kernels_take() -> None:
    config = json.loads((base_model_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64


@pytest.mark.parametrize(
    ("name", "rank", "targets", "rslora", "rank_pattern"),
    [
        ("pirate", 4, ATTENTION | {"gate_proj"}, False, {}),
        ("sql", 16, ALL_SEVEN, False, {}),
        ("json", 64, ALL_SEVEN, False, {}),
        ("french", 16, ALL_SEVEN, True, {"v_proj": 12, "down_proj": 32, "layers.3.mlp.gate_proj": 8}),
    ],
)
def test_adapters_differ_as_promised(
    name: str, rank: int, targets: set[str], rslora: bool, rank_pattern: dict[str, int]
) -> None:
    config = json.loads((adapter_paths()[name] / "adapter_config.json").read_text())
    assert config["r"] == rank
    assert set(config["target_modules"]) == targets
    assert config["use_rslora"] is rslora
    assert config["rank_pattern"] == rank_pattern
    assert config["base_model_name_or_path"] == "multilora-demo"


def test_adapters_are_found_by_listing() -> None:
    assert list(adapter_paths()) == ["french", "json", "pirate", "sql"]


def test_all_of_it_is_small() -> None:
    files = [file for file in base_model_path().parent.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 16_000_000
