"""What is behind a decoder, by its config alone."""

from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from multilora.errors import ModelUnsupported
from multilora.models.heads import HeadKind, classifier_settings, head_kind


def raw(name: str | None, kind: str) -> dict[str, Any]:
    return {"model_type": kind, "architectures": None if name is None else [name]}


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("LlamaForCausalLM", "llama", HeadKind("LlamaForCausalLM", "LlamaForCausalLM")),
        ("GPT2LMHeadModel", "gpt2", HeadKind("GPT2LMHeadModel", "GPT2LMHeadModel")),
        (
            "Qwen3ForSequenceClassification",
            "qwen3",
            HeadKind("Qwen3ForSequenceClassification", "Qwen3ForCausalLM", generates=False, classifies=True),
        ),
        ("MistralModel", "mistral", HeadKind("MistralModel", "MistralForCausalLM", generates=False)),
        ("GPT2Model", "gpt2", HeadKind("GPT2Model", "GPT2LMHeadModel", generates=False)),
        ("ViTModel", "vit", HeadKind("ViTModel", "ViTModel")),
        ("NobodyKnowsThis", "llama", HeadKind("NobodyKnowsThis", "NobodyKnowsThis")),
        (None, "llama", HeadKind("", "")),
    ],
)
def test_kinds(name: str | None, kind: str, expected: HeadKind) -> None:
    assert head_kind(raw(name, kind)) == expected


def test_the_config_of_the_decoder() -> None:
    given = raw("LlamaForSequenceClassification", "llama")
    assert head_kind(given).as_decoder(given)["architectures"] == ["LlamaForCausalLM"]
    given = raw("LlamaForCausalLM", "llama")
    assert head_kind(given).as_decoder(given) is given


def test_labels() -> None:
    kind = head_kind(raw("LlamaForSequenceClassification", "llama"))
    hf = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    hf.id2label = {0: "bad", 1: "good"}
    hf.problem_type = "multi_label_classification"
    found = classifier_settings(kind, hf)
    assert found is not None
    assert (found.labels, found.problem_type) == (("bad", "good"), "multi_label_classification")
    assert classifier_settings(head_kind(raw("LlamaModel", "llama")), hf) is None


def test_another_head_is_refused() -> None:
    kind = head_kind(raw("BertForSequenceClassification", "bert"))
    with pytest.raises(ModelUnsupported, match="BertForSequenceClassification is not supported"):
        classifier_settings(kind, AutoConfig.for_model("bert", num_hidden_layers=1))
