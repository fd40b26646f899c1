"""Tiny classification models and adapters with classification heads, saved by transformers and PEFT, and who serves
them."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakes.models import FAMILIES, TINY_SIZES, train_randomly
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from multilora import LLM
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine


def save_classifier(path: Path, family: str, labels: int, seed: int = 0, **config: Any) -> Any:
    """A random classification model of the family in directory `path`, and transformers' own model."""
    prefix, extra = FAMILIES.get(family, (family, {}))
    sizes = TINY_SIZES if family in FAMILIES else {}
    made = getattr(transformers, f"{prefix}Config")(**(sizes | extra | config), num_labels=labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(made)
        for name, weight in model.named_parameters():
            norm = name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
            weight.data.normal_(mean=1.0 if norm else 0.0, std=0.2)
    model.eval().save_pretrained(path)
    return model


def save_head(path: Path, base: Path, labels: int, seed: int = 0, **config: Any) -> Any:
    """An adapter that PEFT trains to classify, as PEFT saves it, over the decoder in `base`."""
    options: dict[str, Any] = {"num_labels": labels, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(base, **options)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **config), autocast_adapter_dtype=False)
        train_randomly(model, "float32")
        model.save_pretrained(str(path))
    return model.eval()


@torch.no_grad()
def scores_of(model: Any, prompt: list[int]) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([prompt])).logits[0]
    return found


def serve(path: Path, adapters: dict[str, Path], **options: Any) -> LLM:
    defaults = {"device": "cpu", "max_total_tokens": 2048, "page_size": 4, "chunked_prefill_size": 16}
    options = {**defaults, "skip_tokenizer_init": True} | options
    with pytest.MonkeyPatch.context() as patch:  # no process to start
        patch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))
        paths = {name: str(adapter) for name, adapter in adapters.items()}
        return LLM(str(path), lora_paths=paths, **options)
