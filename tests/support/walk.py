"""One architecture of transformers' causal-LM mapping, served with adapters and held against transformers + PEFT.

A tiny random model, four adapters that PEFT saved, a fifth on experts where they take any, and the base model in one
batch, in fp32 on the CPU. Greedy answers must be PEFT's token for token and every logprob of every position PEFT's to
4e-5 of the largest, or the model must be refused by name before any weight is read. What came out is a `Verdict`;
those of all architectures are in `tests/data/architectures.json`.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import tiny_config, tiny_model
from clear_answers import clear_answer
from exactness import ask_for_all, told
from fakes.engine_driver import EngineDriver
from fakes.models import train_randomly
from transformers import AutoModelForCausalLM

from multilora.errors import ModelUnsupported
from multilora.models.base import CausalLM
from multilora.models.load import make_model
from multilora.models.transformers_backend.model import TransformersCausalLM

NEW_TOKENS = 6
CLOSE = 4e-5  # largest difference of a logprob, as a part of the largest logprob
PROMPTS = 40  # tried for two whose every choice is clear


@dataclass(frozen=True)
class Verdict:
    """How an architecture is served: "native" or "transformers", with the largest difference of a logprob and what
    ranks share of it, or "refused", with the reason."""

    way: str
    reason: str = ""
    ranks: str = ""
    worst: float = 0.0


def examine(architecture: str, model_type: str, root: Path, impl: str = "auto") -> Verdict:
    """Serve a tiny model of this architecture. Raises AssertionError where its answers are not PEFT's."""
    config = tiny_config(model_type, architecture)
    (root / "model").mkdir()
    config.save_pretrained(root / "model")
    try:
        model = make_model(str(root / "model"), device=torch.device("meta"), model_impl=impl)
    except ModelUnsupported as e:
        named = architecture in e.message and "\n" not in e.message
        return Verdict(
            "refused" if named else "refused without its name", e.message.partition("is not supported: ")[2]
        )
    tiny_model(architecture, config).save_pretrained(root / "model")
    way = "transformers" if isinstance(model, TransformersCausalLM) else "native"
    worst = compare(root, adapter_configs(model, names_of_experts(model_type)), impl)
    return Verdict(way, ranks=shared(model), worst=worst)


def shared(model: CausalLM) -> str:
    """What ranks share of the model: "all", "all but attention", or "nothing: " and why."""
    if not isinstance(model, TransformersCausalLM):
        return "all"
    division = model.config.division
    if division.obstacle:
        return f"nothing: {division.obstacle}"
    return "all" if division.heads else "all but attention"


def compare_on_ranks(architecture: str, model_type: str, root: Path, ranks: int) -> None:
    """Serve a tiny model by ranks that share it, through transformers. Raises AssertionError where its answers are
    not PEFT's."""
    config = tiny_config(model_type, architecture)
    tiny_model(architecture, config).save_pretrained(root / "model")
    model = make_model(str(root / "model"), device=torch.device("meta"), model_impl="transformers")
    compare(root, adapter_configs(model, names_of_experts(model_type)), "transformers", ranks)


def targeted(parent: str, leaf: str) -> str:
    """What PEFT's users call a module: a name, or two where the last is a number."""
    return f"{parent.rpartition('.')[2]}.{leaf}" if leaf.isdigit() else leaf


def names_of_experts(model_type: str) -> set[str]:
    """What PEFT takes for the parameters of experts in models of this kind, which transformers has fused."""
    from peft.utils import transformers_weight_conversion as peft_rules

    kind = peft_rules._MODEL_TO_CONVERSION_PATTERN.get(model_type, model_type)
    return set(peft_rules._MOE_TARGET_MODULE_MAPPING.get(kind, ()))


def adapter_configs(model: CausalLM, of_experts: set[str]) -> dict[str, dict[str, Any]]:
    """Fields of PEFT's LoraConfig: several targets, ranks, DoRA, modules replaced."""
    slices = [s for site in model.lora_sites() if site.layer >= 0 and not site.experts for s in site.slices]
    leaves = dict.fromkeys(targeted(s.parent, s.attribute or s.module) for s in slices)
    names = [name for name in leaves if name not in of_experts]
    norms = {norm.attribute or norm.module for norm in model.norms()}
    replaced = [names[-1], *sorted(norms)[:1]]
    of_sites = [s for site in model.lora_sites() if site.experts for s in site.slices]
    parameters = list(dict.fromkeys(f"{s.parent}.{s.attribute}" for s in of_sites))
    experts = {"r": 3, "lora_alpha": 2, "target_modules": names[:1], "target_parameters": parameters}
    return {
        "all": {"r": 8, "lora_alpha": 12, "target_modules": names},
        "some": {"r": 3, "lora_alpha": 6, "target_modules": names[:2], "use_rslora": True},
        "dora": {"r": 4, "lora_alpha": 8, "target_modules": names[-2:], "use_dora": True},
        "saved": {"r": 2, "lora_alpha": 4, "target_modules": names[:1], "modules_to_save": replaced},
        **({"experts": experts} if parameters else {}),
    }


def compare(
    root: Path, configs: dict[str, dict[str, Any]], impl: str, ranks: int = 1, served: str = "model"
) -> float:
    """The largest difference of a logprob in a batch that mixes the adapters and the base model.

    served: the directory in root of what is served, if that is another form of the reference's weights.
    """
    references: dict[str | None, Any] = {None: load(root / "model")}
    for seed, (name, config) in enumerate(configs.items()):
        references[name] = make_adapter(root / name, root / "model", seed, config)
    jobs = [(name, *clear) for name, model in references.items() for clear in clear_answers(model)]
    adapters = {name: root / name for name in configs}
    options: dict[str, Any] = {"page_size": 4, "chunked_prefill_size": 16, "model_impl": impl, "tp_size": ranks}
    driver = EngineDriver(root / served, adapters, **options)
    try:
        order = jobs[::2] + jobs[1::2]
        vocab = order[0][3].shape[1]
        rids = [ask_for_all(driver, job[1], job[0], vocab=vocab, max_new_tokens=NEW_TOKENS) for job in order]
        driver.run()
        worst = 0.0
        for rid, (name, _, tokens, logprobs) in zip(rids, order, strict=True):
            answer = driver.answers[rid]
            assert answer.tokens == tokens, f"{name}: {answer.tokens} are not PEFT's {tokens}"
            found = told(answer, vocab)
            error = (found - logprobs[: len(found)]).abs().max() / logprobs.abs().max().clamp(min=1.0)
            worst = max(worst, float(error))
    finally:
        driver.close()
    assert worst < CLOSE, f"a logprob differs by {worst} of the largest"
    return worst


def clear_answers(model: Any, count: int = 2) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """Prompts with their answers, whose every choice is clear."""
    found: list[tuple[list[int], list[int], torch.Tensor]] = []
    for prompt in prompts():
        answer = clear_answer(model, prompt, NEW_TOKENS)
        if answer is not None:
            found.append((prompt, *answer))
        if len(found) == count:
            return found
    raise AssertionError("no prompt has a clear answer")


def prompts() -> Iterator[list[int]]:
    for seed in range(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        length = 19 + 5 * (seed % 3)
        yield torch.randint(3, 101, (length,), generator=generator).tolist()


def load(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0)
    return model


def make_adapter(path: Path, model_path: Path, seed: int, config: dict[str, Any]) -> Any:
    """PEFT's model with a random adapter on it, which is saved to `path`."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(load(model_path), LoraConfig(**config), autocast_adapter_dtype=False)
        train_randomly(model)
        model.save_pretrained(str(path), save_embedding_layers=False)
    return model.eval()
