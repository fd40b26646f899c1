"""Quantised base models as checkpoints have them, made from tiny ones, and what is right over them: transformers and
PEFT with linear layers that compute by a definition of their own, which shares no code with the package.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clear_answers import clear_answer
from exactness import ask_for_all, told
from fakes.engine_driver import EngineDriver
from fakes.models import make_tiny_model, train_randomly
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

MATRIX_OF_AN_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
VOCAB = 101
NEW_TOKENS = 6
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERT_ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "experts": {"r": 4, "target_modules": ["o_proj"], "target_parameters": _EXPERTS},
    "router": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.gate.weight", _EXPERTS[1]],
    },
}
"""Fields of PEFT's LoraConfig for a mixture."""
Tensors = dict[str, torch.Tensor]
Quantise = Callable[[str, torch.Tensor], Tensors]
"""What a checkpoint has for a linear layer: from its path and weight, tensors by their names in the module."""


def write_quantised(
    path: Path, config: dict[str, Any], quantise: Quantise, skipped: tuple[str, ...] = (), **model: Any
) -> None:
    """Write a tiny model with the weights of its decoder's linear layers and experts as `quantise` says, and
    config.json."""
    reference = make_tiny_model(path, **model)
    tensors = load_file(path / "model.safetensors")
    experts = [name.removesuffix(".weight") for name in tensors if MATRIX_OF_AN_EXPERT.search(name)]
    for name in (*decoder_linears(reference), *experts):
        if not any(end in f"{name}." for end in skipped):
            weight = tensors.pop(f"{name}.weight")
            tensors |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in quantise(name, weight).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | {"quantization_config": config}))


class RoundedLinear(nn.Linear):
    """A linear layer over a dequantised weight whose inputs are rounded first. round: [..., in] to the same."""

    round: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(self.round(input))


def plain_twin(path: Path, weights: Callable[[str], tuple[torch.Tensor, Callable[..., torch.Tensor]]]) -> Any:
    """transformers' model of a quantised checkpoint. weights: of a layer's path, what it multiplies with and how it
    rounds its inputs."""
    written = json.loads((path / "config.json").read_text())
    written.pop("quantization_config")
    plain = path.parent / f"{path.name}-plain"
    plain.mkdir(exist_ok=True)
    (plain / "config.json").write_text(json.dumps(written))
    tensors = load_file(path / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if t.is_floating_point() and t.dtype.itemsize > 1}
    rounds = {}
    held = (".weight", ".qweight", ".weight_packed")
    for name in {name.rpartition(".")[0] for name in tensors if name.endswith(held)}:
        if f"{name}.weight" not in kept:
            kept[f"{name}.weight"], rounds[name] = weights(name)
    names = {f"{name}.weight" for name in rounds} | {f"{n}.bias" for n in rounds if ".experts." not in n}
    kept = {n: t for n, t in kept.items() if n.rpartition(".")[0] not in rounds or n in names}
    save_file({n: t.contiguous() for n, t in kept.items()}, plain / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    experts = {}
    for name, round_inputs in rounds.items():
        parent, is_one, _ = name.partition(".experts.")
        if is_one:
            experts[f"{parent.replace('.block_sparse_moe', '.mlp')}.experts"] = round_inputs
        else:
            round_at(model.get_submodule(name), round_inputs)
    for path, round_inputs in experts.items():
        if isinstance(round_inputs, nn.Identity):
            continue
        round_experts(model.get_submodule(path), round_inputs)
    return model


def round_experts(experts: Any, round_inputs: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make the experts of a layer round what they multiply with their weights, which are those of now. What adapters
    add to the weights is multiplied with what is not rounded."""
    held = {name: getattr(experts, name).detach().clone() for name in ("gate_up_proj", "down_proj")}

    def product(name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = held[name][expert]
        return round_inputs(x) @ weight.T + x @ (getattr(experts, name)[expert] - weight).T

    def forward(x: torch.Tensor, taken: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for expert in range(len(held["down_proj"])):
            token, place = torch.where(taken == expert)
            gate, up = product("gate_up_proj", expert, x[token]).chunk(2, dim=-1)
            y = product("down_proj", expert, nn.functional.silu(gate) * up)
            total.index_add_(0, token, y * weights[token, place, None])
        return total

    experts.forward = forward


def round_at(module: Any, round_inputs: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make a RoundedLinear of a linear layer."""
    module.__class__ = RoundedLinear
    module.round = round_inputs


def decoder_linears(model: Any) -> dict[str, nn.Linear]:
    """By path; all but the head."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


def with_adapter(path: Path, base: Callable[[], Any], seed: int, **config: Any) -> Any:
    """PEFT's model over another copy of the base model, with a random adapter, which is saved to `path`."""
    import warnings

    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model: PeftModel = get_peft_model(base(), LoraConfig(**config), autocast_adapter_dtype=False)
        train_randomly(model)
        for name, module in model.named_modules():
            if ".modules_to_save." in name and isinstance(module, RoundedLinear):
                module.round = nn.Identity()  # a weight that an adapter brings is no quantised one
        model.save_pretrained(str(path))
    return model.eval()


def held_against_peft(
    path: Path, models: dict[str | None, Any], close: float, *, typical: float | None = None, **options: Any
) -> None:
    """One batch of all: tokens are equal where the choice is clear, logprobs near (a number that falls on the other
    side of a rounding to 8 bits moves them). typical: how near those of most positions are."""
    driver = EngineDriver(path / "base", {name: path / name for name in models if name}, page_size=4, **options)
    try:
        expected, rids = {}, {}
        for name, model in models.items():
            prompt, answer = clear_prompt(model)
            expected[name] = answer
            rids[name] = ask_for_all(driver, prompt, name, vocab=VOCAB, max_new_tokens=NEW_TOKENS)
        driver.run()
        for name, (tokens, logprobs) in expected.items():
            answer = driver.answers[rids[name]]
            assert answer.tokens == tokens, name
            found = told(answer, VOCAB)
            errors = (found - logprobs[: len(found)]).abs().amax(-1)
            assert errors.max() < close and errors.median() < (typical or close), name
    finally:
        driver.close()


def clear_prompt(model: Any) -> tuple[list[int], tuple[list[int], torch.Tensor]]:
    for seed in range(40):
        prompt = torch.randint(3, VOCAB, (11,), generator=torch.Generator().manual_seed(seed)).tolist()
        if (answer := clear_answer(model, prompt, NEW_TOKENS)) is not None:
            return prompt, answer
    raise AssertionError("no clear answer in 40 prompts")
