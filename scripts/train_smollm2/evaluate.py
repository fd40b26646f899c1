"""Answers of the engine to held-out questions, base model and adapters together, and what they are worth."""

import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from multilora import LLM

from .corpora import SPLITS, Example, examples
from .data import prompt_ids
from .metrics import METRICS

log = logging.getLogger("train_smollm2")

TOKENS = 128
AT_ONCE = 2048  # prompts of one call, which takes at most 4096
INSTRUCTIONS = {
    "pirate": "Answer the user's question briefly, in the voice of a pirate.",
    "sql": "Answer the user's question with one SQLite query for this table, and with nothing else.",
    "json": "Answer with one JSON object that has exactly the keys that the user names, taken from the text; "
    "null for what the text does not say. Write nothing else.",
    "french": "Translate the user's sentence from English to French. Write the translation and nothing else.",
}
"""What the base model is told in its second row, so that it is beaten by more than knowing what is wanted."""
WHO = ("adapter", "base", "base, told what to do")


@dataclass(frozen=True)
class Asked:
    """One question to one of the three."""

    voice: str
    split: str
    who: str
    example: Example

    @property
    def system(self) -> str | None:
        return INSTRUCTIONS[self.voice] if self.who == WHO[2] else None

    @property
    def lora(self) -> str | None:
        return self.voice if self.who == WHO[0] else None


def evaluate(model: str, adapters: dict[str, Path], count: int, **options: Any) -> dict[str, Any]:
    """Ask `count` questions of each voice and split. options: of `LLM`, such as device and dtype."""
    asked = [
        Asked(voice, split, who, example)
        for voice in adapters
        for split in SPLITS[1:]
        for example in examples(voice, split, count)
        for who in WHO
    ]
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [prompt_ids(tokenizer, one.example.prompt, one.system) for one in asked]
    paths = {voice: str(path) for voice, path in adapters.items()}
    with LLM(model, lora_paths=paths, **options) as llm:
        log.info("asking %d questions, adapters and base model together", len(asked))
        began = time.monotonic()
        params = {"temperature": 0, "max_new_tokens": TOKENS}
        loras = [one.lora for one in asked]
        answers = [
            answer
            for start in range(0, len(asked), AT_ONCE)
            for answer in llm.generate(prompts[start : start + AT_ONCE], params, loras[start : start + AT_ONCE])
        ]
        seconds = time.monotonic() - began
    texts = [answer.text.strip() for answer in answers]
    return {
        "rows": _rows(asked, texts),
        "samples": _samples(asked, texts),
        "seconds": round(seconds, 1),
        "tokens": sum(len(answer.token_ids) for answer in answers),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "torch": torch.__version__,
    }


def _rows(asked: Sequence[Asked], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Mean measures by voice, split and who answered."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for one, text in zip(asked, texts, strict=True):
        found.setdefault((one.voice, one.split, one.who), []).append(METRICS[one.voice](one.example, text))
    return [
        {"voice": voice, "held_out": split, "who": who, "questions": len(measures)}
        | {name: round(sum(one[name] for one in measures) / len(measures), 4) for name in measures[0]}
        for (voice, split, who), measures in found.items()
    ]


def _samples(asked: Sequence[Asked], texts: Sequence[str], each: int = 4) -> list[dict[str, str]]:
    """The first answers of each voice and split, to be read."""
    found: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for one, text in zip(asked, texts, strict=True):
        rows = found.setdefault((one.voice, one.split, one.who), [])
        if len(rows) < each:
            rows.append(
                {"voice": one.voice, "held_out": one.split, "who": one.who, "prompt": one.example.prompt,
                 "reference": one.example.answer, "answer": text}
            )  # fmt: skip
    return [row for rows in found.values() for row in rows]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The first measure of each voice: how often it is right, in Markdown."""
    lines = [
        "| adapter | held out | measure | questions | " + " | ".join(WHO) + " |",
        "|---|---|---|---|---|---|---|",
    ]
    for voice, split in dict.fromkeys((row["voice"], row["held_out"]) for row in rows):
        mine = {row["who"]: row for row in rows if (row["voice"], row["held_out"]) == (voice, split)}
        keys = [key for key in mine[WHO[0]] if key not in ("voice", "held_out", "who", "questions")]
        for key in keys:
            cells = " | ".join(f"{100 * mine[who][key]:.1f} %" for who in WHO)
            lines.append(f"| `{voice}` | {split} | {key} | {mine[WHO[0]]['questions']} | {cells} |")
    return "\n".join(lines)


def write(report: dict[str, Any], folder: Path) -> None:
    """`evaluation.json` and `evaluation.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (folder / "evaluation.md").write_text(table(report["rows"]) + "\n")
