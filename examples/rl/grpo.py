"""GRPO in one file: a LoRA is trained with PEFT while multilora rolls it out, in about a minute on two CPU cores.

    python -m examples.rl.grpo --out DIR                  # the engine in this process
    python -m examples.rl.grpo --out DIR --url http://…   # multilora serve --enable-lora --dtype float32

The bundled model knows the sums of two digits, but only in the wordings that it was taught. Asked in another wording
("Add 3 and 4.") it is right about one time in five. The reward is 1 for an answer that ends and whose last number is
the sum, else 0: verifiable, no model judges. Three sums in ten are never trained on and are asked before and after.

Each step: publish the adapter's weights as tensors under a new name, unload the old name; sample a group of answers
to each prompt, with their logprobs; standardise the rewards within each group; one clipped policy gradient step
(Shao et al., DeepSeekMath, 2024; loss averaged over tokens, no KL term). The ratio of the loss is taken against the
logprobs that the rollouts came with, so a serving engine that computed the adapter differently would show at once:
the largest difference is written down for every step.

Writes `rewards.json` and `rewards.svg` to DIR.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.rl.plot import line_chart
from examples.rl.rollouts import InProcess, OverHttp, Rollout, Rollouts
from multilora.demo import base_model_path

WORDING = "Q: Add {} and {}.\nA:"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Settings:
    """`prompts` × `group` answers a step; `held_out` sums of the 100 are never trained on."""

    steps: int = 50
    prompts: int = 8
    group: int = 8
    held_out: int = 30
    max_new_tokens: int = 16
    rank: int = 8
    learning_rate: float = 1e-3
    clip: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """`mismatch`: the largest difference, over the step's tokens, of the trainer's logprob and the rollout's."""

    step: int
    reward: float
    loss: float
    mismatch: float
    tokens: int
    seconds: float


Sum = tuple[int, int]


def reward(asked: Sum, answer: Rollout) -> float:
    """1 for an answer that ends and whose last number is the sum, else 0."""
    numbers = re.findall(r"\d+", answer.text)
    return float(answer.complete and bool(numbers) and int(numbers[-1]) == sum(asked))


class Trainer:
    """The base model with one LoRA, in float32, and its optimiser."""

    def __init__(self, model_path: str, settings: Settings):
        torch.manual_seed(settings.seed)
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        config = LoraConfig(
            r=settings.rank, lora_alpha=2 * settings.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        self.model: PeftModel = get_peft_model(base, config)
        self.model.eval()  # there is no dropout to want
        self._clip = settings.clip
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)

    def weights(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What PEFT would save: the tensors by name, and the config as JSON has it."""
        tensors = {name: t.detach().clone() for name, t in get_peft_model_state_dict(self.model).items()}
        config = self.model.peft_config["default"].to_dict()
        return tensors, {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}

    def logprobs(self, rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every answer's tokens, `[rollouts, longest answer]`, and the mask of those that exist."""
        longest = max(len(r.prompt_ids) + len(r.token_ids) for r in rollouts)
        ids = torch.zeros(len(rollouts), longest, dtype=torch.long)  # padded on the right, where nothing looks
        for row, r in enumerate(rollouts):
            both = r.prompt_ids + r.token_ids
            ids[row, : len(both)] = torch.tensor(both)
        logits = self.model(input_ids=ids).logits
        width = max(len(r.token_ids) for r in rollouts)
        starts = torch.tensor([len(r.prompt_ids) for r in rollouts])[:, None]
        places = (starts + torch.arange(width)).clamp(max=longest - 1)  # [rollouts, width]
        mask = torch.arange(width) < torch.tensor([len(r.token_ids) for r in rollouts])[:, None]
        chosen = ids.gather(1, places)
        rows = torch.arange(len(rollouts))[:, None]
        found = logits[rows, places - 1].log_softmax(-1).gather(2, chosen[..., None])[..., 0]
        return found, mask

    def update(self, rollouts: Sequence[Rollout], advantages: torch.Tensor) -> tuple[float, float]:
        """One policy gradient step; `advantages` `[rollouts]`. Returns the loss and the mismatch."""
        new, mask = self.logprobs(rollouts)
        old = torch.zeros_like(new)
        for row, r in enumerate(rollouts):
            old[row, : len(r.logprobs)] = torch.tensor(r.logprobs)
        mismatch = ((new - old).abs() * mask).max().item()
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - self._clip, 1 + self._clip)
        advantage = advantages[:, None]
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        loss = -(gain * mask).sum() / mask.sum()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        return loss.item(), mismatch


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards `[prompts, group]`, standardised within each group; a group of equal rewards teaches nothing."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


class Loop:
    """The training loop: trainer, rollouts and the sums, which are split once."""

    def __init__(self, settings: Settings, rollouts: Rollouts, model_path: str | None = None):
        path = model_path or str(base_model_path())
        self.settings = settings
        self.rollouts = rollouts
        self.trainer = Trainer(path, settings)
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._rng = random.Random(settings.seed)
        sums = [(a, b) for a in range(10) for b in range(10)]
        self._rng.shuffle(sums)
        self._held_out, self._trained = sums[: settings.held_out], sums[settings.held_out :]

    def publish(self, step: int) -> None:
        """The trainer's weights are what is sampled from now on."""
        self.rollouts.publish(step, *self.trainer.weights())

    def accuracy(self) -> float:
        """The part of the held-out sums that the published policy answers rightly, greedily."""
        params = {"temperature": 0.0, "max_new_tokens": self.settings.max_new_tokens}
        answers = self.rollouts.sample([self._prompt(s) for s in self._held_out], 1, params)
        return sum(reward(s, answer) for s, (answer,) in zip(self._held_out, answers, strict=True)) / len(answers)

    def steps(self) -> Iterator[Step]:
        """Train; the weights of the start must have been published."""
        settings = self.settings
        for step in range(1, settings.steps + 1):
            start = time.perf_counter()
            asked = self._rng.sample(self._trained, settings.prompts)
            params = {
                "temperature": 1.0,
                "max_new_tokens": settings.max_new_tokens,
                "sampling_seed": settings.seed * 1_000_000 + step,
            }
            groups = self.rollouts.sample([self._prompt(s) for s in asked], settings.group, params)
            rewards = torch.tensor([[reward(s, r) for r in group] for s, group in zip(asked, groups, strict=True)])
            flat = [r for group in groups for r in group]
            loss, mismatch = self.trainer.update(flat, advantages(rewards).flatten())
            self.publish(step)
            tokens = sum(len(r.token_ids) for r in flat)
            yield Step(step, rewards.mean().item(), loss, mismatch, tokens, time.perf_counter() - start)

    def _prompt(self, asked: Sum) -> list[int]:
        return list(self._tokenizer(WORDING.format(*asked))["input_ids"])


def write_results(out: Path, settings: Settings, steps: Sequence[Step], before: float, after: float) -> None:
    """`rewards.json` and `rewards.svg` in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    data = {
        "settings": asdict(settings),
        "held_out_accuracy": {"before": before, "after": after},
        "steps": [asdict(step) for step in steps],
    }
    (out / "rewards.json").write_text(json.dumps(data, indent=1) + "\n")
    window = 5
    smooth = [
        (s.step, sum(t.reward for t in steps[max(0, i - window + 1) : i + 1]) / min(window, i + 1))
        for i, s in enumerate(steps)
    ]
    chart = line_chart(
        f"GRPO on “{WORDING.splitlines()[0].format('a', 'b')}”: held-out sums {before:.0%} → {after:.0%}",
        f"step ({settings.prompts} prompts × {settings.group} answers)",
        {"mean reward": [(s.step, s.reward) for s in steps], f"mean of {window} steps": smooth},
    )
    (out / "rewards.svg").write_text(chart)


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO of a LoRA on the bundled model, rolling out through multilora")
    parser.add_argument("--out", type=Path, required=True, help="folder for rewards.json and rewards.svg")
    parser.add_argument("--url", help="of a running server; without it the engine runs in this process")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    args = parser.parse_args()
    settings = Settings(steps=args.steps, seed=args.seed)
    rollouts: Rollouts = OverHttp(args.url) if args.url else InProcess()
    try:
        loop = Loop(settings, rollouts)
        loop.publish(0)
        before = loop.accuracy()
        print(f"held-out sums before: {before:.0%}")
        steps = []
        for step in loop.steps():
            steps.append(step)
            print(
                f"step {step.step:3d}  reward {step.reward:.3f}  mismatch {step.mismatch:.1e}  "
                f"{step.tokens} tokens  {step.seconds:.2f} s",
                flush=True,
            )
        after = loop.accuracy()
        print(f"held-out sums after: {after:.0%}")
        write_results(args.out, settings, steps, before, after)
    finally:
        rollouts.close()


if __name__ == "__main__":
    main()
