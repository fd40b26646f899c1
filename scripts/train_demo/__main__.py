"""Command line: trains everything, or with `--reuse-base` only the adapters, then measures what was saved."""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import batches, draw
from .evaluate import mistakes
from .facts import VOICES, Fact, all_facts, weighted_facts
from .tokenizer import train_tokenizer
from .training import adapter_recipes, log, new_base, save_base, train, train_adapter

VOCAB_SIZE = 1024
SEED = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.train_demo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets base/ and adapters/")
    parser.add_argument("--quick", action="store_true", help="a few steps only: does it run at all?")
    parser.add_argument("--reuse-base", action="store_true", help="keep OUT/base, train adapters")
    parser.add_argument("--adapters", nargs="*", choices=VOICES[1:], default=VOICES[1:])
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--adapter-steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1, help="more is faster, and rounds differently")
    return parser.parse_args()


def make_base(facts: list[Fact], folder: Path, steps: int) -> None:
    """Tokenizer and base model."""
    rng = random.Random(SEED)
    texts = [draw(facts, "plain", 0.6, rng).text for _ in range(20_000)]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    data = batches(facts, tokenizer, voice="plain", documents=0.6, batch_size=48, seed=SEED)
    model = new_base(tokenizer)
    log.info("base: %d parameters, %d steps", model.num_parameters(), steps)
    train(model, data, steps=steps, learning_rate=2e-3)
    save_base(model, tokenizer, folder)


def make_adapters(facts: list[Fact], out: Path, names: list[str], steps: int) -> None:
    """Every adapter named, each over a fresh copy of the saved base."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    for name, recipe in adapter_recipes().items():
        if name not in names:
            continue
        torch.manual_seed(SEED)
        data = batches(facts, tokenizer, voice=name, documents=0.0, batch_size=32, seed=SEED)
        log.info("adapter %s: %d steps", name, steps)
        base = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        train_adapter(base, recipe, data, steps=steps, folder=out / "adapters" / name)


def measure(facts: list[Fact], out: Path, names: list[str]) -> None:
    """Logs the share of exactly right answers, and a few wrong ones."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(out / "base")
    for voice in ("plain", *names):
        model = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        if voice != "plain":
            model = PeftModel.from_pretrained(model, out / "adapters" / voice)
        model.eval()
        asked = sum(len(fact.questions[:2]) for fact in facts)
        for chat in (False, True):
            wrong = mistakes(model, tokenizer, facts, voice, chat=chat)
            right = asked - len(wrong)
            form = "chat" if chat else "raw"
            log.info("| %s | %s | %d / %d | %.1f %% |", voice, form, right, asked, 100 * right / asked)
            for question, got in wrong[:8]:
                log.info("    %s → %s", question, got)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = arguments()
    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    facts, weighted = all_facts(), weighted_facts()
    base_steps, adapter_steps = (3, 3) if options.quick else (options.base_steps, options.adapter_steps)
    if options.quick:
        facts = weighted = facts[:6]
    if not options.reuse_base:
        make_base(weighted, options.out / "base", base_steps)
    make_adapters(weighted, options.out, options.adapters, adapter_steps)
    measure(facts, options.out, options.adapters)


if __name__ == "__main__":
    main()
