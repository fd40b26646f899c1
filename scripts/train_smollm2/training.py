"""Trains one adapter with PEFT and says what it cost and what it brought. Knows no metric but the loss."""

import inspect
import json
import logging
import math
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from .corpora import SPLITS, examples
from .data import IGNORED, Row, collated, common_start, encoded, shuffled

log = logging.getLogger("train_smollm2")

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EVERY = 10  # steps between lines of the log
WARM_UP = 20  # steps, or a tenth of the time if that is sooner


@dataclass(frozen=True)
class Settings:
    """How long and how fast: training ends after `steps`, or after `seconds` if that is sooner."""

    steps: int = 600
    batch: int = 64
    learning_rate: float = 1e-3
    seconds: float = math.inf
    examples: int = 12_000
    held_out: int = 200  # examples of each sort, whose loss is measured at the end
    start: Path | None = None  # a folder of adapters to go on from


class Trainer:
    """A frozen base model in memory, on which adapters are trained one after another. dtype "auto": bf16 on a GPU,
    fp32 on a CPU; a CPU with AMX is several times as fast in bf16. On a CPU, what all examples begin with (the chat's
    system message) is computed once a step, not once a row."""

    def __init__(self, model_path: str, device: str = "auto", dtype: str = "auto"):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        self._narrow = dtype == "bfloat16"
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(model_path)
        self.base = (
            AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).to(self.device).eval()
        )
        self._share = self.device.type == "cpu"
        if self._share:  # of short rows: the fused kernel's backward takes a quarter of a step on a CPU
            self.base.set_attn_implementation("eager")

    def train(self, voice: str, recipe: dict[str, Any], folder: Path, settings: Settings) -> dict[str, Any]:
        """Writes config and weights as PEFT does, in bf16. Returns what is to be known about the training."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's about transformers
            config = peft.LoraConfig(task_type="CAUSAL_LM", bias="none", **recipe)
            model = peft.get_peft_model(self.base, config)
            started_from = None if settings.start is None else _go_on_from(model, settings.start, voice)
        try:
            rows = encoded(self.tokenizer, examples(voice, "train", settings.examples))
            began = time.monotonic()
            losses = self._steps(model, rows, settings)
            seconds = time.monotonic() - began
            _round(model)
            report = {
                "voice": voice,
                "recipe": recipe,
                "examples": len(rows),
                "steps": len(losses),
                "batch": settings.batch,
                "seconds": round(seconds, 1),
                "loss": [round(sum(part) / len(part), 4) for part in _parts(losses)],
                "held_out_loss": {split: self._held_out(model, voice, split, settings) for split in SPLITS[1:]},
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
                "versions": {package.__name__: package.__version__ for package in (torch, transformers, peft)},
            }
            if started_from is not None:
                report["started_from"] = started_from
            report["bytes"] = _save(model, folder)
            return report
        finally:
            self.base = model.unload()

    def _steps(self, model: peft.PeftModel, rows: Sequence[Row], settings: Settings) -> list[float]:
        """AdamW, a short warm-up, then a cosine to zero over the steps or the seconds. Returns the losses."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        began, losses = time.monotonic(), []
        for step, batch in enumerate(shuffled(rows, settings.batch, random.Random(0))):
            progress = max(step / settings.steps, (time.monotonic() - began) / settings.seconds)
            if progress >= 1:
                break
            warm = max((step + 1) / WARM_UP, 10 * progress)
            rate = min(1.0, warm) * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
            loss = self._loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if step % EVERY == EVERY - 1:
                log.info("step %4d  loss %.4f  %4.0f s", step + 1, float(loss), time.monotonic() - began)
        return [float(loss) for loss in losses]

    def _loss(self, model: peft.PeftModel, rows: Sequence[Row]) -> torch.Tensor:
        """Cross entropy of the answers' tokens; logits are computed for these only."""
        ids, labels = collated(rows, self.tokenizer.eos_token_id, self.device)
        inner = model.get_base_model()
        shared = common_start(rows) if self._share else 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._narrow):
            hidden = hidden_states(inner.model, ids, shared)[:, :-1]
            labels = labels[:, shared + 1 :]
            learnt = labels != IGNORED
            logits = inner.lm_head(hidden[learnt])  # [learnt, vocabulary]
        return nn.functional.cross_entropy(logits.float(), labels[learnt])

    @torch.no_grad()
    def _held_out(self, model: peft.PeftModel, voice: str, split: str, settings: Settings) -> dict[str, float]:
        """Mean loss per batch of examples that were not trained on, of the base model and with the adapter."""
        rows = encoded(self.tokenizer, examples(voice, split, settings.held_out))
        batches = [rows[first : first + 32] for first in range(0, len(rows), 32)]
        with_adapter = sum(float(self._loss(model, batch)) for batch in batches) / len(batches)
        with model.disable_adapter():
            base = sum(float(self._loss(model, batch)) for batch in batches) / len(batches)
        return {"base": round(base, 4), "adapter": round(with_adapter, 4)}


def hidden_states(model: nn.Module, ids: torch.Tensor, shared: int) -> torch.Tensor:
    """The last layer's output after the first `shared` tokens, which are the same in all rows and computed once.
    [rows, tokens - shared, hidden]"""
    if not shared:
        return cast(torch.Tensor, model(input_ids=ids, use_cache=False).last_hidden_state)
    cache = model(input_ids=ids[:1, :shared], use_cache=True).past_key_values
    for layer in cache.layers:  # [1, heads, shared, head] → [rows, …]
        layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
        layer.values = layer.values.expand(len(ids), -1, -1, -1)
    takes = inspect.signature(model.forward).parameters  # transformers before 5.24 has the other name
    name = "cache" if "cache" in takes else "past_key_values"
    return cast(torch.Tensor, model(input_ids=ids[:, shared:], **{name: cache}).last_hidden_state)


def _go_on_from(model: peft.PeftModel, folder: Path, voice: str) -> dict[str, Any]:
    """Give the model the adapter in `folder`. Returns what is known about its training. Raises ValueError for an
    adapter of another shape."""
    known = folder / f"{voice}.json"
    weights = load_file(folder / voice / "adapter_model.safetensors")
    found = peft.set_peft_model_state_dict(model, weights)
    missing = [name for name in found.missing_keys if "lora_" in name]
    if found.unexpected_keys or missing:
        raise ValueError(f"{folder / voice} has other modules: {[*found.unexpected_keys, *missing][:3]}")
    return cast(dict[str, Any], json.loads(known.read_text())) if known.exists() else {"folder": str(folder)}


def _parts(losses: Sequence[float]) -> list[Sequence[float]]:
    return [losses[first : first + EVERY] for first in range(0, len(losses), EVERY)]


def _round(model: peft.PeftModel) -> None:
    """Rounds the adapter to what is saved, so that this is what is measured."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())


def _save(model: peft.PeftModel, folder: Path) -> int:
    """Returns the size of the weights in bytes."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.peft_config["default"].base_model_name_or_path = MODEL_NAME
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()  # PEFT keeps a set, whose order changes from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return (folder / "adapter_model.safetensors").stat().st_size
