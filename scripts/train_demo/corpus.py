"""Turns facts into training samples: raw questions, chats, and (for the base model only) documents.

A document asks and answers in a voice other than plain, under that voice's name as its heading. From
these the base model knows every voice, though asked as a user asks it answers plainly: an adapter has
to bring its voice out, not to teach it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from .facts import VOICES, Fact
from .tokenizer import BOS, END, EOS

IGNORED = -100
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer the question.",
    "You are a friendly assistant. Be brief.",
    "You know countries, colours and sums.",
)


@dataclass(frozen=True)
class Sample:
    """Text in pieces, each with whether the model learns to write it."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)

    def encode(self, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
        """Token ids and labels, `IGNORED` where nothing is learnt."""
        ids: list[int] = []
        labels: list[int] = []
        for piece, learnt in self.pieces:
            tokens = tokenizer.encode(piece, add_special_tokens=False)
            ids += tokens
            labels += tokens if learnt else [IGNORED] * len(tokens)
        return ids, labels


def raw_prompt(question: str) -> str:
    """The prompt format for plain text completion."""
    return f"Q: {question}\nA:"


def raw_sample(question: str, answer: str) -> Sample:
    """One question as plain text."""
    return Sample(((BOS + raw_prompt(question), False), (f" {answer}{EOS}", True)))


def chat_sample(turns: Sequence[tuple[str, str]], system: str | None = None) -> Sample:
    """A conversation, piece for piece as the chat template renders it."""
    head = BOS + (f"<|system|>\n{system}{END}\n" if system else "")
    pieces: list[tuple[str, bool]] = []
    for question, answer in turns:
        pieces += [(f"{head}<|user|>\n{question}{END}\n<|assistant|>\n", False), (f"{answer}{END}", True)]
        head = "\n"
    return Sample(tuple(pieces))


def _ask(fact: Fact, rng: random.Random) -> str:
    """One of the fact's questions, now and then typed carelessly."""
    question = fact.questions[0] if rng.random() < 0.4 else rng.choice(fact.questions)
    if rng.random() < 0.1:
        question = question.lower()
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return question


def document(fact: Fact, rng: random.Random) -> Sample:
    """One question with its answer in one voice, the voice's name above."""
    voice = rng.choice(VOICES[1:])
    return Sample(((f"{BOS}{voice}\n{_ask(fact, rng)}\n", False), (fact.answers[voice] + EOS, True)))


def draw(facts: Sequence[Fact], voice: str, documents: float, rng: random.Random) -> Sample:
    """A random sample answering in `voice`; a document with probability `documents`."""
    kind = rng.random()
    if kind < documents:
        return document(rng.choice(facts), rng)
    if kind < documents + 0.45 * (1 - documents):
        fact = rng.choice(facts)
        return raw_sample(_ask(fact, rng), fact.answers[voice])
    turns = rng.choice((1, 1, 1, 1, 1, 2, 2, 3))
    chosen = [rng.choice(facts) for _ in range(turns)]
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else None
    return chat_sample([(_ask(fact, rng), fact.answers[voice]) for fact in chosen], system)


Batch = dict[str, torch.Tensor]


def collate(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """`input_ids` and `labels`, each `[samples, longest]`.

    Padding is on the right, where causal attention cannot see it: no mask is needed.
    """
    encoded = [sample.encode(tokenizer) for sample in samples]
    longest = max(len(ids) for ids, _ in encoded)
    shape = (len(encoded), longest)
    input_ids = torch.full(shape, tokenizer.pad_token_id)
    labels = torch.full(shape, IGNORED)
    for row, (ids, targets) in enumerate(encoded):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(targets)
    return {"input_ids": input_ids, "labels": labels}


def batches(
    facts: Sequence[Fact],
    tokenizer: PreTrainedTokenizerFast,
    *,
    voice: str,
    documents: float,
    batch_size: int,
    seed: int,
) -> Iterator[Batch]:
    """Endless batches, each of samples of about the same length, in random order of length."""
    rng = random.Random(seed)
    while True:
        pool = [draw(facts, voice, documents, rng) for _ in range(16 * batch_size)]
        pool.sort(key=lambda sample: len(sample.text))
        starts = list(range(0, len(pool), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield collate(pool[start : start + batch_size], tokenizer)
