"""`multilora adapters verify`: compares one adapter's answers here with those of transformers and PEFT.

The engine answers every prompt with the adapter and without, in one batch, greedily; then PEFT reads the same
sequences, and each token must be PEFT's choice and each logprob must agree. This file owns prompts and comparison;
`reference.py` computes with PEFT. Called by `cli/adapter_commands.py`.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from multilora.adapter_tools.reference import Reference, SpecialTokens
from multilora.adapters.sources import resolve
from multilora.errors import ConfigError
from multilora.front.tokenizer import Tokenizer
from multilora.llm.completion import Completion
from multilora.llm.offline import LLM
from multilora.models.config import ModelConfig
from multilora.models.load import read_config

TOLERANCES = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.25}
"""The largest difference of a natural logarithm from the fp32 reference. bfloat16 keeps 8 bits of each number."""
LENGTHS = (1, 7, 16, 33)  # tokens of the random prompts: around the end of a page
NEW_TOKENS = 16
TOP = 50  # how many of the likeliest tokens are compared at each position
NAME = "adapter"
TEXTS = ("Write a short story about a lighthouse.", "The quick brown fox")


@dataclass(frozen=True)
class Check:
    """The result for one prompt. equal: how many of the `tokens` new tokens the reference would choose, too."""

    prompt: str
    length: int
    adapter: bool  # False: the base model alone, in the same batch
    tokens: int
    equal: int
    difference: float  # the largest of a logprob, over the prompt and the new tokens

    def within(self, tolerance: float) -> bool:
        return self.equal == self.tokens and self.difference <= tolerance


@dataclass(frozen=True)
class Verdict:
    """The result for one adapter."""

    path: str
    model_path: str
    dtype: str
    tolerance: float
    peft_version: str
    checks: list[Check]

    @property
    def difference(self) -> float:
        return max(check.difference for check in self.checks if check.adapter)

    @property
    def ok(self) -> bool:
        return all(check.within(self.tolerance) for check in self.checks if check.adapter)

    @property
    def base_ok(self) -> bool:
        return all(check.within(self.tolerance) for check in self.checks if not check.adapter)


@dataclass(frozen=True)
class _Prompt:
    label: str
    ids: list[int]


def verify(
    path: str,
    model_path: str,
    *,
    prompts: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "auto",
    tolerance: float | None = None,
    progress: bool = False,
) -> Verdict:
    """Compare one adapter. prompts: texts, used besides random token ids; none: two built-in ones if the model has a
    tokenizer. progress: draw a bar on stderr while PEFT reads the answers.

    Raises AdapterError for what cannot be loaded, ConfigError for a bad model or when PEFT is not installed.
    """
    Reference.check_installed()
    _, config = read_config(model_path)
    directory = str(resolve(path))
    with _llm(directory, model_path, bool(prompts), dtype=dtype, device=device) as llm:
        special = SpecialTokens.of(Path(directory))
        asked = _prompts(llm.tokenizer, config, prompts, special)
        both = [*asked, *asked]
        names = [NAME] * len(asked) + [None] * len(asked)
        params = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        wanted: dict[str, Any] = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": TOP}
        answers: list[Completion] = llm.generate([p.ids for p in both], params, names, **wanted)
    reference = Reference(model_path, device)
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    checks = []
    with tqdm(total=len(both), desc="verify", unit="prompt", disable=not progress) as bar:
        for adapter in (False, True):
            if adapter:
                reference.put_on(directory, special)
            for prompt, name, answer in zip(both, names, answers, strict=True):
                if (name is not None) == adapter:
                    logprobs = reference.logprobs(prompt.ids, answer.token_ids)
                    checks.append(_compare(prompt, adapter, answer, logprobs, limit))
                    bar.update()
    return Verdict(path, model_path, dtype, limit, reference.peft_version, checks)


def _llm(directory: str, model_path: str, with_texts: bool, **options: Any) -> LLM:
    """The engine, with a tokenizer if the model has one. Raises ConfigError if there are texts but no tokenizer."""
    options |= {"lora_paths": {NAME: directory}, "max_total_tokens": 4096, "disable_radix_cache": True}
    options["max_logprobs"] = TOP
    try:
        return LLM(model_path, **options)
    except ConfigError as e:
        if with_texts or "tokenizer" not in e.message:
            raise
        return LLM(model_path, skip_tokenizer_init=True, **options)


def _prompts(
    tokenizer: Tokenizer | None, config: ModelConfig, texts: Sequence[str], special: SpecialTokens
) -> list[_Prompt]:
    """All prompts, cut to what the model's context holds beside the new tokens."""
    rng = random.Random(0)
    longest = config.context_length - NEW_TOKENS
    ids = [[rng.randrange(config.vocab_size) for _ in range(n)] for n in LENGTHS]
    found = [_Prompt(f"{len(some)} random tokens", some) for some in ids if len(some) <= longest]
    if special.trained:
        found.append(_Prompt("trained tokens", [*ids[1], *special.trained][-longest:]))
    if special.invocation:
        found.append(_Prompt("invocation tokens", [*ids[1], *special.invocation, *ids[2]][:longest]))
    if tokenizer is not None:
        for text in texts or TEXTS:
            label = text if len(text) <= 40 else f"{text[:39]}…"
            found.append(_Prompt(repr(label), tokenizer.encode(text)[:longest]))
    return found


def _compare(prompt: _Prompt, adapter: bool, answer: Completion, expected: torch.Tensor, tolerance: float) -> Check:
    """expected: log-softmax of the reference over prompt and answer, [positions, vocab]."""
    start = len(prompt.ids)
    assert answer.input_top_logprobs is not None and answer.top_logprobs is not None
    tops = [*(answer.input_top_logprobs[1:]), *answer.top_logprobs]  # tops[i] follows position i
    difference = 0.0
    for position, top in enumerate(tops):
        ids = torch.tensor([token for _, token in top or []])
        ours = torch.tensor([logprob for logprob, _ in top or []])
        apart = (ours - expected[position, ids]).abs().nan_to_num(nan=math.inf)
        difference = max(difference, float(apart.max()))
    equal = 0
    for i, token in enumerate(answer.token_ids):
        row = expected[start - 1 + i]
        equal += bool(row[token] >= row.max() - tolerance)
    return Check(prompt.label, start, adapter, len(answer.token_ids), equal, difference)
