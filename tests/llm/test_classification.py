"""`LLM.classify` equals transformers and PEFT to 1e-4: classification checkpoints, and adapters with heads of their
own on any base, in batches that mix them.

The reference is AutoModelForSequenceClassification with PeftModel, one text at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from classifiers import save_classifier, save_head, scores_of, serve
from fakes.models import TINY_SIZES, make_adapter, make_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from multilora import LLM
from multilora.errors import AdapterIncompatible, AdapterUnsupported, BadRequest
from multilora.lora.sites import SCORE

CLOSE = 1e-4
PAD = TINY_SIZES["pad_token_id"]
PROMPTS = [[5, 9, 17, 40], [3], list(range(10, 50)), [7, 8, PAD, 9, PAD, PAD], [PAD, PAD]]
ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "two": (2, {"r": 8, "target_modules": ["q_proj", "v_proj"]}),
    "five": (5, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "one": (1, {"r": 4, "target_modules": ["k_proj"], "modules_to_save": ["norm"]}),
}
"""Number of labels, and what PEFT is told."""


@dataclass
class World:
    """One base model and its adapters: PEFT's models by name, and the one that serves them."""

    llm: LLM
    models: dict[str | None, Any]
    embedders: dict[str | None, Any] = field(default_factory=dict)


KINDS = ["classifier", "causal", "decoder", "transformers"]
"""A classification checkpoint; a causal LM, whose adapters bring all heads; a decoder alone; the first again, through
transformers' modules."""


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("world")
    base, models = path / "base", dict[str | None, Any]()
    match request.param:
        case "causal":
            make_tiny_model(base)
        case "decoder":
            make_tiny_model(path / "causal").get_decoder().save_pretrained(base)
        case _:
            models[None] = save_classifier(base, "llama", 3)
    for seed, (name, (labels, config)) in enumerate(ADAPTERS.items()):
        if models and name == "two":
            labels = 3  # as many as the base model: its names are the labels'
        models[name] = save_head(path / name, base, labels, seed, **config)
    impl = "transformers" if request.param == "transformers" else "auto"
    llm = serve(base, {name: path / name for name in ADAPTERS}, model_impl=impl)
    yield World(llm, models)
    llm.close()


def test_mixed_batches_equal_peft(world: World) -> None:
    jobs = [(name, prompt) for prompt in PROMPTS for name in world.models]
    for _ in range(2):  # and again, from cached prefixes
        found = world.llm.classify([prompt for _, prompt in jobs], [name for name, _ in jobs])
        for (name, prompt), one in zip(jobs, found, strict=True):
            expected = scores_of(world.models[name], prompt)
            assert len(one.scores) == len(expected)
            assert torch.tensor(one.scores).sub(expected).abs().max() < CLOSE, (name, prompt)
            chances = expected.softmax(0) if len(expected) > 1 else expected.sigmoid()
            assert torch.tensor(one.probs).sub(chances).abs().max() < CLOSE
            assert one.label == f"LABEL_{expected.argmax()}"


def test_beside_embeddings_and_answers(world: World) -> None:
    """Embeddings are the decoder's rows under every adapter; only a causal LM answers."""
    llm, prompt = world.llm, PROMPTS[2]
    for name, model in world.models.items():
        decoder = model.base_model.model.model if name else model.model
        with torch.no_grad():
            row = decoder(torch.tensor([prompt])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(row, dim=0)
        assert torch.tensor(llm.embed(prompt, name).embedding).sub(expected).abs().max() < CLOSE
    if llm._local.ready.generates:
        assert len(llm.generate(prompt, {"max_new_tokens": 3, "ignore_eos": True}, "two").token_ids) == 3
    else:
        with pytest.raises(BadRequest, match="no language-model head"):
            llm.generate(prompt)
    if None not in world.models:
        with pytest.raises(BadRequest, match="the base model has none"):
            llm.classify(prompt)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "GPT2"])
def test_families(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0}
    base = save_classifier(tmp_path / "base", family, 4, **(sizes if family == "GPT2" else {}))
    targets = ["c_attn"] if family == "GPT2" else ["q_proj", "v_proj"]
    tuned = save_head(tmp_path / "a", tmp_path / "base", 4, r=4, target_modules=targets)
    with serve(tmp_path / "base", {"a": tmp_path / "a"}) as llm:
        for prompt in PROMPTS:
            for found, model in zip(llm.classify([prompt] * 2, [None, "a"]), (base, tuned), strict=True):
                assert torch.tensor(found.scores).sub(scores_of(model, prompt)).abs().max() < CLOSE


@pytest.mark.parametrize(
    ("problem", "chances"),
    [
        ("single_label_classification", lambda scores: scores.softmax(0)),
        ("multi_label_classification", torch.sigmoid),
        ("regression", lambda scores: scores),
    ],
)
def test_labels_and_problems(problem: str, chances: Any, tmp_path: Path) -> None:
    names = {0: "bad", 1: "good", 2: "odd"}
    model = save_classifier(tmp_path, "llama", 3, id2label=names, problem_type=problem)
    with serve(tmp_path, {}) as llm:
        for prompt in PROMPTS:
            found, expected = llm.classify(prompt), scores_of(model, prompt)
            assert found.label == names[int(expected.argmax())]
            assert torch.tensor(found.probs).sub(chances(expected)).abs().max() < CLOSE


def test_a_generating_adapter_on_a_classifier(tmp_path: Path) -> None:
    """It has no head of its own: the base model's classifies."""
    model = save_classifier(tmp_path / "base", "llama", 3)
    make_tiny_model(tmp_path / "causal")
    make_adapter(tmp_path / "a", tmp_path / "causal", r=4, target_modules=["q_proj"])
    make_adapter(tmp_path / "lm", tmp_path / "causal", r=4, target_modules=["q_proj", "lm_head"])
    with serve(tmp_path / "base", {"a": tmp_path / "a"}) as llm:
        assert len(llm.classify(PROMPTS[0], "a").scores) == model.num_labels
        with pytest.raises(AdapterIncompatible, match="lm_head"):
            llm.load_lora_adapter("lm", str(tmp_path / "lm"))


def test_what_is_refused_of_a_head(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_classifier(base, "llama", 2)
    save_head(tmp_path / "wide", base, 2, r=4, target_modules=["q_proj"])
    save_head(tmp_path / "lora", base, 2, r=4, target_modules=["q_proj"])
    name = f"base_model.model.{SCORE}"
    low_rank = {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(2, 4)}
    for adapter, changed in (("wide", {f"{name}.weight": torch.zeros(2, 65)}), ("lora", low_rank)):
        file = tmp_path / adapter / "adapter_model.safetensors"
        save_file(load_file(file) | changed, file)
    with serve(base, {}, enable_lora=True) as llm:
        with pytest.raises(AdapterIncompatible, match=r"score.*\[2, 64\]"):
            llm.load_lora_adapter("wide", str(tmp_path / "wide"))
        with pytest.raises(AdapterUnsupported, match="LoRA on the classification head"):
            llm.load_lora_adapter("lora", str(tmp_path / "lora"))


@pytest.mark.slow
def test_on_two_ranks(tmp_path: Path) -> None:
    """Every rank holds the heads; rows are pooled from what all of them have summed."""
    base = save_classifier(tmp_path / "base", "llama", 3)
    tuned = save_head(tmp_path / "a", tmp_path / "base", 5, r=4, target_modules=["q_proj", "down_proj"])
    with serve(tmp_path / "base", {"a": tmp_path / "a"}, tp_size=2) as llm:
        for prompt in PROMPTS:
            for found, model in zip(llm.classify([prompt] * 2, [None, "a"]), (base, tuned), strict=True):
                assert torch.tensor(found.scores).sub(scores_of(model, prompt)).abs().max() < CLOSE
        with torch.no_grad():
            rows = base.model(torch.tensor([PROMPTS[2]])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(rows.mean(0), dim=0)
        assert torch.tensor(llm.embed(PROMPTS[2], pooling="mean").embedding).sub(expected).abs().max() < CLOSE


def test_a_decoder_alone(tmp_path: Path) -> None:
    """AutoModel's own checkpoints, whose tensors have shorter names."""
    model = AutoModel.from_config(transformers.LlamaConfig(**TINY_SIZES))
    model.eval().save_pretrained(tmp_path)
    with serve(tmp_path, {}) as llm:
        with torch.no_grad():
            row = model(torch.tensor([PROMPTS[2]])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(row, dim=0)
        assert torch.tensor(llm.embed(PROMPTS[2]).embedding).sub(expected).abs().max() < CLOSE
        with pytest.raises(BadRequest, match="decoder alone"):
            llm.generate(PROMPTS[0])
