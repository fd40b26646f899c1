"""Adapters on mixtures of experts, held against transformers + PEFT: on attention, on the router, on experts.

One batch mixes them with each other and the base model, in chunks, with pages of a prefix cache that are used again.
In fp32 greedy answers are PEFT's token for token, and so are the logprobs of every position to 4e-5 of the largest.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config, tiny_model
from clear_answers import clear_answer
from exactness import ask_for_all, told
from expert_layouts import EXPERTS, MIXTRAL, QWEN, as_stacks, by_expert, rewrite
from fakes.engine_driver import EngineDriver
from fakes.models import make_tiny_model
from peft import PeftModel
from walk import NEW_TOKENS, load, make_adapter, prompts

from multilora.errors import AdapterUnsupported

CLOSE = 4e-5
ATTENTION = ["q_proj", "v_proj", "o_proj"]
WEIGHTS = ("gate_up_proj", "down_proj")
BOTH = [f"mlp.experts.{name}" for name in WEIGHTS]
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 12, "target_modules": ATTENTION},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_dora": True},
    "router": {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    "experts": {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj"], "target_parameters": BOTH},
    "down only, rsLoRA": {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_parameters": BOTH[1:]},
    "router saved": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"], "modules_to_save": ["mlp.gate"]},
    "one layer's": {
        "r": 2,
        "lora_alpha": 4,
        "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj", "mlp.gate.weight"],
        "rank_pattern": {"gate_up_proj": 5},
        "alpha_pattern": {"gate.weight": 7},
    },
}
MODELS = {
    "qwen3_moe": ("qwen3_moe", {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "mixtral": ("mixtral", {"num_local_experts": 6}),
    "qwen2_moe": ("qwen2_moe", {}),
}


@dataclass(frozen=True)
class Job:
    """An adapter (None: the base model), and what PEFT answers to a prompt with it."""

    adapter: str | None
    prompt: list[int]
    tokens: list[int]
    logprobs: torch.Tensor


def jobs_of(name: str | None, model: Any, count: int = 2) -> list[Job]:
    """Prompts with the same beginning, so that pages are used again, whose answers are clear."""
    found: list[Job] = []
    start = next(prompts())[:12]
    for prompt in prompts():
        answer = clear_answer(model, start + prompt, NEW_TOKENS)
        if answer is not None:
            found.append(Job(name, start + prompt, *answer))
        if len(found) == count:
            return found
    raise AssertionError("no prompt has a clear answer")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare(driver: EngineDriver, jobs: list[Job]) -> None:
    """All logprobs, then the answers from pages of the first time."""
    vocab = jobs[0].logprobs.shape[1]
    order = jobs[::2] + jobs[1::2]
    rids = [ask_for_all(driver, job.prompt, job.adapter, vocab=vocab, max_new_tokens=NEW_TOKENS) for job in order]
    driver.run()
    for rid, job in zip(rids, order, strict=True):
        answer = driver.answers[rid]
        assert answer.tokens == job.tokens, f"{job.adapter}: {answer.tokens} are not PEFT's {job.tokens}"
        found = told(answer, vocab)
        error = (found - job.logprobs[: len(found)]).abs().max() / job.logprobs.abs().max().clamp(min=1.0)
        assert error < CLOSE, f"{job.adapter}: a logprob differs by {error} of the largest"
    rids = [driver.submit(job.prompt, job.adapter, max_new_tokens=NEW_TOKENS) for job in order]
    driver.run()
    for rid, job in zip(rids, order, strict=True):
        assert driver.answers[rid].tokens == job.tokens
        assert driver.answers[rid].cached_tokens > 0


@pytest.mark.parametrize(
    "case", ["qwen3_moe", *(pytest.param(c, marks=pytest.mark.slow) for c in ("mixtral", "qwen2_moe"))]
)
def test_adapters_of_a_mixture_of_experts(case: str, tmp_path: Path) -> None:
    """On one rank, and where two divide the experts."""
    family, overrides = MODELS[case]
    path = tmp_path / "model"
    make_tiny_model(path, family, **overrides)
    configs = {n: c for n, c in ADAPTERS.items() if case != "qwen3_moe" or n != "one layer's"}
    jobs = jobs_of(None, load(path))
    for seed, (name, config) in enumerate(configs.items()):
        jobs += jobs_of(name, make_adapter(tmp_path / name, path, seed, config))
    for ranks in (1, 2):
        options: dict[str, Any] = {"page_size": 4, "chunked_prefill_size": 16, "tp_size": ranks}
        driver = EngineDriver(path, {n: tmp_path / n for n in configs}, **options)
        try:
            compare(driver, jobs)
            assert driver.infos["experts"].target_modules == ["experts.down_proj", "experts.gate_up_proj", "v_proj"]
            assert driver.infos["experts"].rank == 4
        finally:
            driver.close()


def share_outer(model: Any) -> None:
    """Give all experts the A of gate and up, and the B of down, in common."""
    for name, weight in model.named_parameters():
        if ".experts.base_layer.lora_A" in name:
            weight.data.copy_(weight.data[: weight.shape[0] // EXPERTS].repeat(EXPERTS, 1))
        elif ".experts.lora_B" in name:
            weight.data.copy_(weight.data[:, ::EXPERTS].repeat_interleave(EXPERTS, 1))


@pytest.mark.parametrize(
    ("family", "names", "impl"),
    [
        pytest.param("qwen3_moe", QWEN, "native", marks=pytest.mark.slow),
        ("mixtral", MIXTRAL, "native"),
        pytest.param("qwen3_moe", QWEN, "transformers", marks=pytest.mark.slow),
    ],
)
def test_every_layout_of_adapters_on_experts(family: str, names: dict[str, str], impl: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    make_tiny_model(path, family, num_experts=EXPERTS)
    jobs = jobs_of(None, load(path))
    fused = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": BOTH}
    for name, config in {"wrappers": fused, "stacks": fused | {"r": 8}, "shared": fused | {"r": 3}}.items():
        model = make_adapter(tmp_path / name, path, len(jobs), config)
        if name == "shared":
            share_outer(model)
            model.save_pretrained(str(tmp_path / name))
        jobs += jobs_of(name, model)
    plain = {"target_parameters": None, "target_modules": ["q_proj", "gate_up_proj", "down_proj"]}
    rewrite(tmp_path / "stacks", as_stacks, **plain)
    rewrite(tmp_path / "shared", partial(as_stacks, shared=True), **plain)
    make_adapter(tmp_path / "by expert", path, 9, fused | {"r": 5})
    modules = [names[module] for module in ("gate", "up", "down")]
    older = {"target_parameters": None, "target_modules": ["q_proj", *modules]}
    rewrite(tmp_path / "by expert", partial(by_expert, names=names), **older)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about patterns of its own making
        converted = PeftModel.from_pretrained(load(path), str(tmp_path / "by expert")).eval()
    jobs += jobs_of("by expert", converted)
    adapters = {name: tmp_path / name for name in ("wrappers", "stacks", "shared", "by expert")}
    for ranks in (1, 2):
        options: dict[str, Any] = {"page_size": 4, "chunked_prefill_size": 16, "model_impl": impl, "tp_size": ranks}
        driver = EngineDriver(path, adapters, **options)
        try:
            compare(driver, jobs)
            assert {name: info.rank for name, info in driver.infos.items()} == {
                "wrappers": 4,
                "stacks": 8,
                "shared": 3,
                "by expert": 5,
            }
        finally:
            driver.close()


GPT_OSS: dict[str, dict[str, Any]] = {
    "two layers' experts": {
        "r": 8,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "target_parameters": [f"{layer}.mlp.experts.{name}" for layer in (1, 2) for name in WEIGHTS],
    },
    "all experts, rsLoRA": {
        "r": 3,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj"],
        "target_parameters": BOTH,
        "rank_pattern": {"experts.gate_up_proj": 6},
    },
    "gate and up": {"r": 2, "lora_alpha": 6, "target_parameters": BOTH[:1]},
    "down": {"r": 5, "lora_alpha": 6, "target_parameters": ["3.mlp.experts.down_proj"]},
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_dora": True},
}


def make_tree_model(path: Path, architecture: str, model_type: str, **fields: Any) -> None:
    config = tiny_config(model_type, architecture)
    for name, value in fields.items():
        setattr(config, name, value)
    tiny_model(architecture, config).save_pretrained(path)


@pytest.mark.slow
def test_adapters_on_experts_of_gpt_oss(tmp_path: Path) -> None:
    """Windows and sinks, biases, a limit that is reached, weights as [experts, in, out], gate and up interleaved. On
    one rank, and where two divide each expert."""
    path, layers = tmp_path / "model", ["sliding_attention", "full_attention"] * 2
    fields = {"num_hidden_layers": 4, "layer_types": layers, "num_local_experts": EXPERTS, "swiglu_limit": 1.5}
    make_tree_model(path, "GptOssForCausalLM", "gpt_oss", **fields)
    jobs = jobs_of(None, load(path))
    for seed, (name, config) in enumerate(GPT_OSS.items()):
        jobs += jobs_of(name, make_adapter(tmp_path / name, path, seed, config))
    for ranks in (1, 2):
        options: dict[str, Any] = {"page_size": 4, "chunked_prefill_size": 16, "tp_size": ranks}
        driver = EngineDriver(path, {n: tmp_path / n for n in GPT_OSS}, **options)
        try:
            compare(driver, jobs)
            info = driver.infos["two layers' experts"]
            projections = ["k_proj", "o_proj", "q_proj", "v_proj"]
            assert info.target_modules == ["experts.down_proj", "experts.gate_up_proj", *projections]
        finally:
            driver.close()


def test_stacked_tensors_for_interleaved_gates_are_refused(tmp_path: Path) -> None:
    make_tree_model(tmp_path / "model", "GptOssForCausalLM", "gpt_oss", num_local_experts=EXPERTS)
    make_adapter(tmp_path / "stacks", tmp_path / "model", 0, {"r": 4, "target_parameters": BOTH})
    rewrite(tmp_path / "stacks", as_stacks, target_parameters=None, target_modules=[*WEIGHTS])
    driver = EngineDriver(tmp_path / "model")
    try:
        with pytest.raises(
            AdapterUnsupported, match=r"experts\.gate_up_proj': stacked tensors are not supported here"
        ):
            driver.load("stacks", tmp_path / "stacks")
    finally:
        driver.close()


def test_routers_of_transformers_take_no_adapters_and_say_so(tmp_path: Path) -> None:
    path = tmp_path / "model"
    make_tree_model(path, "OlmoeForCausalLM", "olmoe")
    make_adapter(tmp_path / "attention", path, 0, {"r": 2, "target_modules": ["q_proj"]})
    make_adapter(tmp_path / "router", path, 1, ADAPTERS["router"])
    for ranks in (1, 2):
        driver = EngineDriver(path, {"attention": tmp_path / "attention"}, model_impl="transformers", tp_size=ranks)
        try:
            with pytest.raises(AdapterUnsupported, match=r"adapters on '\S+\.mlp\.gate\S*' are not supported"):
                driver.load("router", tmp_path / "router")
            assert driver.complete([5, 6, 7], "attention").tokens
        finally:
            driver.close()
