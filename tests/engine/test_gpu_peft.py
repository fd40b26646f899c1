"""The rows of the parity table in bf16 on a GPU, with FlashInfer and Triton kernels.

Per row, alone and in a batch with a plain adapter and the base model, all logprobs of all positions may be off from
transformers + PEFT in fp32 by hardly more than transformers + PEFT in bf16 are. What is refused, and that tokens are
the same in fp32, is test_peft_parity.py's. MULTILORA_TEST_DEVICE=cpu tries it out without a GPU.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exactness import SLACK, ask_for_all, judge, told
from fakes.engine_driver import EngineDriver
from peft_rows import ROWS, Lab, Row
from transformers import AutoModelForCausalLM

DEVICE = os.environ.get("MULTILORA_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# that FlashInfer takes
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
NEW_TOKENS = 8
COUNT = 4  # prompts
WORST = 2.5  # times what transformers + PEFT in bf16 err: the worst answer; the base model's would be 25 times it
SERVED = [row for row in ROWS if row.refused is None]


class Bench:
    """One engine for a model, with a plain adapter; transformers' base model and PEFT's plain one in fp32."""

    def __init__(self, lab: Lab, name: str):
        path = lab.model(name)
        plain = Row(
            f"plain {name}", {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj", "o_proj"]}, name
        )
        self.driver = EngineDriver(
            path,
            {"plain": lab.adapter(plain)},
            device=DEVICE,
            dtype="bfloat16",
            arena_bytes=64 << 20,
            max_running_requests=8,
        )
        self.models: dict[str | None, Any] = {
            None: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
            "plain": lab.reference(plain),
        }
        self.prompts = plain.prompts(COUNT)


class Benches:
    def __init__(self, lab: Lab):
        self.lab = lab
        self._made: dict[str, Bench] = {}

    def get(self, model: str) -> Bench:
        if model not in self._made:
            self._made[model] = Bench(self.lab, model)
        return self._made[model]

    def close(self) -> None:
        for bench in self._made.values():
            bench.driver.close()


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Benches]:
    benches = Benches(Lab(tmp_path_factory.mktemp("rows"), **SIZES))
    yield benches
    benches.close()


@pytest.mark.parametrize("row", SERVED, ids=[row.feature for row in SERVED])
def test_no_less_exact_than_transformers_and_peft_in_bf16(row: Row, benches: Benches) -> None:
    bench = benches.get(row.model)
    driver, models = bench.driver, bench.models | {"row": benches.lab.reference(row)}
    driver.load("row", benches.lab.adapter(row))
    alone = [("row", prompt) for prompt in row.prompts(COUNT)]
    mixed = [
        job for i, job in enumerate(alone) for job in (job, ("plain", bench.prompts[i]), (None, bench.prompts[i]))
    ]
    answers: dict[str | None, list[tuple[list[int], torch.Tensor]]] = {name: [] for name in models}
    for batch in (*([job] for job in alone), mixed):
        vocab = {name: model.get_output_embeddings().weight.shape[0] for name, model in models.items()}
        rids = [
            ask_for_all(driver, prompt, name, vocab=vocab[name], max_new_tokens=NEW_TOKENS, ignore_eos=True)
            for name, prompt in batch
        ]
        driver.run()
        for rid, (name, prompt) in zip(rids, batch, strict=True):
            answer = driver.answers[rid]
            answers[name].append((prompt + answer.tokens, told(answer, vocab[name])))
    driver.unload("row")
    for name in models:
        found = judge(models, {name: answers[name]}, DEVICE, torch.bfloat16)
        assert 0 < found.error <= SLACK * found.theirs, name
        assert found.worst <= WORST * found.theirs, name
