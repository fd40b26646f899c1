"""Turns examples into batches of token ids: a chat, of which the answer is learnt."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedTokenizerFast

from .corpora import Example

IGNORED = -100
POOL = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Row:
    """The token ids of one example; the answer begins at `start`."""

    ids: list[int]
    start: int


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, system: str | None = None) -> list[int]:
    """A user's message as the model sees it, up to where the answer begins."""
    chat = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def end_of_answer(tokenizer: PreTrainedTokenizerFast) -> str:
    """What ends an assistant's message by the chat template, which may not be `eos_token`; that is what ends it where
    the template adds nothing."""
    mark = "the answer"
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": mark}]
    text = cast(str, tokenizer.apply_chat_template(chat, tokenize=False))
    return text.rpartition(mark)[2].rstrip() or cast(str, tokenizer.eos_token)


def encoded(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[Row]:
    """Prompt and answer with the token that ends it."""
    rows, end = [], end_of_answer(tokenizer)
    for example in examples:
        prompt = prompt_ids(tokenizer, example.prompt)
        answer = tokenizer.encode(example.answer + end, add_special_tokens=False)
        rows.append(Row([*prompt, *answer], len(prompt)))
    return rows


def common_start(rows: Sequence[Row]) -> int:
    """How many tokens all rows begin with alike, before the last one of the shortest prompt."""
    shortest = min(row.start for row in rows) - 1
    return next((i for i in range(shortest) if len({row.ids[i] for row in rows}) > 1), shortest)


def collated(rows: Sequence[Row], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `labels`, int64 [rows, longest]. Padding is on the right, where causal attention is blind."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
    return ids.to(device), labels.to(device)


def shuffled(rows: Sequence[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Endless batches, each of rows of about the same length."""
    rows = list(rows)
    while True:
        rng.shuffle(rows)
        for first in range(0, len(rows), POOL * size):
            pool = sorted(rows[first : first + POOL * size], key=lambda row: len(row.ids))
            starts = list(range(0, len(pool), size))
            rng.shuffle(starts)
            yield from (pool[start : start + size] for start in starts)
