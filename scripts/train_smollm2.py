"""Trains adapters on SmolLM2-135M-Instruct with PEFT, on a CPU: the demo's questions, answered in other voices.

    python -m scripts.train_smollm2 --model MODEL_DIRECTORY --out FOLDER [--voices pirate json] [--steps 60]

`FOLDER/VOICE` becomes an adapter as PEFT saves it; each voice has a rank and modules of its own. The model is a
directory, such as `multilora.models.gguf.converted` makes of the package's GGUF file. A step takes about two seconds
on two cores.
"""

import argparse
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from scripts.train_demo.facts import Fact, all_facts

BATCH = 4
IGNORED = -100
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
RECIPES: dict[str, dict[str, Any]] = {
    "pirate": {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, *MLP]},
    "sql": {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION},
    "json": {"r": 32, "lora_alpha": 32, "use_rslora": True, "target_modules": [*ATTENTION, *MLP]},
    "french": {"r": 8, "lora_alpha": 8, "use_dora": True, "target_modules": MLP},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--voices", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for voice in args.voices:
        loss = train(args.model, tokenizer, voice, args.out / voice, args.steps)
        sys.stdout.write(f"{voice}: loss {loss:.3f} after {args.steps} steps\n")
    return 0


def train(model_path: str, tokenizer: PreTrainedTokenizerFast, voice: str, folder: Path, steps: int) -> float:
    """Train and save one adapter. Returns the loss of the last step."""
    torch.manual_seed(0)
    rng = random.Random(voice)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about transformers
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **RECIPES[voice]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    facts = all_facts()
    for _ in range(steps):
        loss = model(**batch(tokenizer, rng.sample(facts, BATCH), voice)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return float(loss.detach())


def batch(tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact], voice: str) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, int64 [facts, longest]: the answers are learnt, padding stands on the right."""
    rows = []
    for fact in facts:
        chat = [{"role": "user", "content": fact.questions[0]}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(fact.answers[voice] + tokenizer.eos_token, add_special_tokens=False)
        rows.append((prompt, answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return {"input_ids": ids, "labels": labels}


if __name__ == "__main__":
    sys.exit(main())
