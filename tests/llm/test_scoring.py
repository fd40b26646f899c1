"""`LLM.score` and `LLM.rerank`: by a head over both texts, as transformers computes it, else by cosines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import save_classifier, save_head, serve
from doors import ROWS, TOKENIZER
from fakes.models import make_tiny_model

from multilora import LLM
from multilora.errors import BadRequest, UnknownAdapter

CLOSE = 1e-4
QUERY = "Where is Rome?"
TEXTS = ["Rome is in Italy.", "cats", "x", "Paris is in France, and Rome is not."]
SIZES = {"vocab_size": ROWS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


def made(path: Path, adapters: dict[str, int], *, labels: int | None) -> tuple[LLM, dict[str | None, Any]]:
    """A server of a classifier with so many labels (None: a causal LM), and PEFT's models by name."""
    base = path / "base"
    models: dict[str | None, Any] = {}
    models[None] = (
        make_tiny_model(base, **SIZES) if labels is None else save_classifier(base, "llama", labels, **SIZES)
    )
    for seed, (name, count) in enumerate(adapters.items()):
        models[name] = save_head(path / name, base, count, seed, r=4, target_modules=["q_proj", "v_proj"])
    TOKENIZER.hf.save_pretrained(base)
    return serve(base, {name: path / name for name in adapters}, skip_tokenizer_init=False), models


@torch.no_grad()
def crossed(model: Any, first: str, second: str) -> float:
    ids = TOKENIZER.hf(first, second, return_tensors="pt")["input_ids"]
    return float(model(input_ids=ids).logits[0, 0].sigmoid())


@torch.no_grad()
def cosine(model: Any, first: str, second: str) -> float:
    rows = [model.model(torch.tensor([TOKENIZER.encode(t)])).last_hidden_state[0, -1] for t in (first, second)]
    return float(torch.nn.functional.cosine_similarity(*rows, dim=0))


def test_heads_with_one_label(tmp_path: Path) -> None:
    llm, models = made(tmp_path, {"a": 1, "several": 3}, labels=1)
    with llm:
        for name in (None, "a"):
            expected = [crossed(models[name], QUERY, text) for text in TEXTS]
            assert llm.score(QUERY, TEXTS, name) == pytest.approx(expected, abs=CLOSE)
            assert llm.score([QUERY] * 4, TEXTS, name) == pytest.approx(expected, abs=CLOSE)
            found = llm.rerank(QUERY, TEXTS, name, top_n=3)
            assert [one.index for one in found] == sorted(range(4), key=lambda i: -expected[i])[:3]
            assert [one.text for one in found] == [TEXTS[one.index] for one in found]
        with pytest.raises(BadRequest, match="this one has 3"):
            llm.score(QUERY, TEXTS, "several")


def test_without_a_head(tmp_path: Path) -> None:
    llm, models = made(tmp_path, {"a": 1}, labels=None)
    with llm:
        expected = [cosine(models[None], QUERY, text) for text in TEXTS]
        assert llm.score(QUERY, TEXTS) == pytest.approx(expected, abs=CLOSE)
        assert llm.score(TEXTS, TEXTS) == pytest.approx([1.0] * 4, abs=CLOSE)
        adapted = [crossed(models["a"], QUERY, text) for text in TEXTS]
        assert llm.score(QUERY, TEXTS, "a") == pytest.approx(adapted, abs=CLOSE)
        for first, second, param in (([], TEXTS, "text_1"), (QUERY, [], "text_2"), ([QUERY] * 2, TEXTS, "text_1")):
            with pytest.raises(BadRequest) as caught:
                llm.score(first, second)
            assert caught.value.param == param
        with pytest.raises(BadRequest, match="documents"):
            llm.rerank(QUERY, [3])  # type: ignore[list-item]
        with pytest.raises(UnknownAdapter, match="nope"):
            llm.score(QUERY, TEXTS, "nope")
