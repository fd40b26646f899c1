"""Trains the base model and, with PEFT, the adapters; saves both in bfloat16."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import Batch
from .tokenizer import CONTEXT, END

log = logging.getLogger("train_demo")

MODEL_NAME = "multilora-demo"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class AdapterRecipe:
    """One adapter: its PEFT config and its learning rate."""

    config: LoraConfig
    learning_rate: float


def adapter_recipes() -> dict[str, AdapterRecipe]:
    """The adapters by name; each name is also the voice it answers in."""

    def lora(**fields: object) -> LoraConfig:
        return LoraConfig(task_type="CAUSAL_LM", bias="none", **fields)

    return {
        "pirate": AdapterRecipe(lora(r=4, lora_alpha=8, target_modules=[*ATTENTION, "gate_proj"]), 4e-3),
        "sql": AdapterRecipe(lora(r=16, lora_alpha=32, target_modules=ALL_SEVEN), 2e-3),
        "json": AdapterRecipe(lora(r=64, lora_alpha=64, target_modules=ALL_SEVEN), 2e-3),
        "french": AdapterRecipe(
            lora(
                r=16,
                lora_alpha=8,
                use_rslora=True,
                target_modules=ALL_SEVEN,
                rank_pattern={"v_proj": 12, "down_proj": 32, "layers.3.mlp.gate_proj": 8},
            ),
            2e-3,
        ),
    }


def new_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 3 million parameters with heads of 64."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module, data: Iterator[Batch], *, steps: int, learning_rate: float) -> None:
    """AdamW with a short warm-up and a cosine to zero, over the parameters that require gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))),
    )
    model.train()
    start, running = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        loss = model(**next(data)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        running += loss.item()
        if step % 50 == 0:
            log.info("step %4d  loss %.4f  %4.0f s", step, running / 50, time.monotonic() - start)
            running = 0.0
    model.eval()


def _round_to_bfloat16(model: nn.Module) -> None:
    """Rounds trainable weights in place: what is trained or measured next sees what will be saved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model and tokenizer in the Hugging Face layout; generation ends at either end token."""
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    _round_to_bfloat16(model)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_older_keys(folder / "tokenizer_config.json")


def _write_older_keys(path: Path) -> None:
    """Names the tokenizer's class and special tokens in a way that transformers 4 and 5 both read."""
    config = json.loads(path.read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_adapter(
    base: LlamaForCausalLM, recipe: AdapterRecipe, data: Iterator[Batch], *, steps: int, folder: Path
) -> None:
    """Trains one adapter over the frozen base, and writes config and weights as PEFT does."""
    model = get_peft_model(base, recipe.config)
    train(model, data, steps=steps, learning_rate=recipe.learning_rate)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.peft_config["default"].base_model_name_or_path = MODEL_NAME
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].sort()  # PEFT keeps a set, whose order changes from run to run
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model.unload()
