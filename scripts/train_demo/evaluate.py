"""Measures how many answers are exactly right, greedily decoded in float32 from the saved files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .corpus import raw_prompt
from .facts import Fact

Model: TypeAlias = PreTrainedModel | PeftModel


@torch.no_grad()
def answer(model: Model, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """Greedy completions (special tokens kept) of prompts that already carry theirs."""
    completions: list[str] = []
    for start in range(0, len(prompts), 128):
        batch = tokenizer(
            list(prompts[start : start + 128]), add_special_tokens=False, padding=True, return_tensors="pt"
        )
        output = model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=128
        )
        for ids in output[:, batch.input_ids.shape[1] :]:
            text = tokenizer.decode(ids[ids != tokenizer.pad_token_id], skip_special_tokens=False)
            completions.append(text)
    return completions


def chat_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """One user turn, rendered by the chat template."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def mistakes(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    facts: Sequence[Fact],
    voice: str,
    *,
    chat: bool,
) -> list[tuple[str, str]]:
    """(question, wrong answer) over the first two wordings of every fact. A missing end is a mistake."""
    asked = [(question, fact.answers[voice]) for fact in facts for question in fact.questions[:2]]
    if chat:
        prompts = [chat_prompt(tokenizer, question) for question, _ in asked]
        expected = [f"{right}<|end|>" for _, right in asked]
    else:
        prompts = [tokenizer.bos_token + raw_prompt(question) for question, _ in asked]
        expected = [f" {right}{tokenizer.eos_token}" for _, right in asked]
    given = answer(model, tokenizer, prompts)
    questions = [question for question, _ in asked]
    return [(q, got) for q, got, right in zip(questions, given, expected, strict=True) if got != right]
