"""`LLM.embed` equals transformers and PEFT to 1e-4, whatever the batch, the chunks, the prefix cache and the family.

The reference runs one text at a time through PEFT's own tree and pools the rows of its last hidden state.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from fakes.tokenizers import byte_level_tokenizer

from multilora import LLM
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine
from multilora.engine.messages import Output
from multilora.errors import BadRequest, PromptTooLong, UnknownAdapter
from multilora.front.embedding import embedding_job, vector_of
from multilora.front.generation import Job
from multilora.params import SamplingParams

CLOSE = 1e-4
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "saved": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["norm", "embed_tokens"]},
    "task": {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "FEATURE_EXTRACTION"},
}
PROMPTS = [[5, 9, 17, 40], [3], list(range(10, 50)), [7, 7, 8, 9, 10, 11, 12], list(range(10, 45))]


def pooled(hidden: torch.Tensor, method: str) -> torch.Tensor:
    """hidden: [tokens, hidden]."""
    return {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}[method]


class References:
    """PEFT's models over one base. By adapter (None: none of them) and prompt: all hidden rows."""

    def __init__(self, models: dict[str | None, Any]):
        self._models = models

    @torch.no_grad()
    def hidden(self, adapter: str | None, prompt: list[int]) -> torch.Tensor:
        model = self._models[adapter]
        model = getattr(model, "base_model", model) if adapter is not None else model
        lm = model.model if adapter is not None else model
        rows: torch.Tensor = lm.get_decoder()(torch.tensor([prompt])).last_hidden_state[0]
        return rows

    def embedding(self, adapter: str | None, prompt: list[int], method: str, size: int | None = None) -> torch.Tensor:
        return torch.nn.functional.normalize(pooled(self.hidden(adapter, prompt), method)[:size], dim=0)


def build(path: Path, family: str, impl: str, adapters: list[str], **options: Any) -> tuple[LLM, References]:
    models: dict[str | None, Any] = {None: make_tiny_model(path / "model", family)}
    byte_level_tokenizer().hf.save_pretrained(path / "model")
    for seed, name in enumerate(adapters):
        models[name] = make_adapter(path / name, path / "model", seed=seed, **ADAPTERS[name])
    paths = {name: str(path / name) for name in adapters}
    options = {"device": "cpu", "max_total_tokens": 2048, "page_size": 4, "model_impl": impl} | options
    with pytest.MonkeyPatch.context() as patch:  # no process to start
        patch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))
        llm = LLM(str(path / "model"), lora_paths=paths, skip_tokenizer_init=True, **options)
    return llm, References(models)


@pytest.fixture(scope="module", params=["native", "transformers"])
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, References]]:
    """Steps of 16 tokens, so that the longest prompts come in three chunks."""
    llm, references = build(
        tmp_path_factory.mktemp("m"), "llama", request.param, list(ADAPTERS), chunked_prefill_size=16
    )
    yield llm, references
    llm.close()


@pytest.mark.parametrize("method", ["last", "mean", "cls"])
def test_mixed_batches_equal_peft(built: tuple[LLM, References], method: str) -> None:
    """Every adapter and base in one batch; and again, when prefixes are cached."""
    llm, references = built
    jobs = [(name, prompt) for prompt in PROMPTS for name in (None, *ADAPTERS)]
    for _ in range(2):
        found = llm.embed([p for _, p in jobs], [name for name, _ in jobs], pooling=method)
        for (name, prompt), embedding in zip(jobs, found, strict=True):
            expected = references.embedding(name, prompt, method)
            assert torch.tensor(embedding.embedding).sub(expected).abs().max() < CLOSE, (name, prompt)
            assert embedding.prompt_tokens == len(prompt)


def test_only_the_last_row_comes_from_a_cached_prefix(built: tuple[LLM, References]) -> None:
    llm, _ = built
    prompt = list(range(60, 90))
    llm.embed(prompt)
    assert llm.embed(prompt).cached_tokens == 28
    assert llm.embed(prompt, pooling="mean").cached_tokens == 0
    assert llm.embed(prompt, pooling="cls").cached_tokens == 0


def test_dimensions_and_length(built: tuple[LLM, References]) -> None:
    """Truncated first, then scaled."""
    llm, references = built
    prompt = PROMPTS[2]
    found = torch.tensor(llm.embed(prompt, "dora", dimensions=10).embedding)
    assert found.sub(references.embedding("dora", prompt, "last", 10)).abs().max() < CLOSE
    raw = torch.tensor(llm.embed(prompt, "dora", dimensions=10, normalize=False).embedding)
    assert raw.sub(references.hidden("dora", prompt)[-1, :10]).abs().max() < CLOSE


def test_beside_generation(built: tuple[LLM, References]) -> None:
    """In the same steps: neither changes the other."""
    llm, references = built
    greedy = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
    alone = [llm.generate(prompt, greedy, "plain").token_ids for prompt in PROMPTS]
    outputs: list[Output] = []
    settings, plain = llm._local.ready.embedding, (("plain", 1.0),)
    jobs: list[Job] = []
    for prompt in PROMPTS:
        jobs.append(Job(prompt=prompt, sampling=SamplingParams.parse(greedy), adapters=plain))
        jobs.append(embedding_job(prompt, settings, "mean", adapters=plain))
    generation = llm._driver.run(llm._front.submit(jobs, outputs.append))
    while not generation.finished:
        llm._local.step()
        while outputs:
            generation.receive(outputs.pop(0))
    generation.close()
    answers, read = generation.samples[::2], generation.samples[1::2]
    assert [sample.stream.token_ids for sample in answers] == alone
    for prompt, sample in zip(PROMPTS, read, strict=True):
        vector = torch.from_numpy(vector_of(sample, None, normalize=True).copy())
        assert vector.sub(references.embedding("plain", prompt, "mean")).abs().max() < CLOSE


def test_a_prompt_as_long_as_the_context(built: tuple[LLM, References]) -> None:
    llm, references = built
    prompt = [10 + i % 80 for i in range(256)]
    found = torch.tensor(llm.embed(prompt, pooling="mean").embedding)
    assert found.sub(references.embedding(None, prompt, "mean")).abs().max() < CLOSE
    with pytest.raises(PromptTooLong, match="256"):
        llm.embed([*prompt, 3])


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families(family: str, tmp_path: Path) -> None:
    llm, references = build(tmp_path, family, "native", ["plain"], pooling="mean")
    with llm:
        for prompt, found in zip(PROMPTS, llm.embed(PROMPTS, "plain"), strict=True):
            assert (
                torch.tensor(found.embedding).sub(references.embedding("plain", prompt, "mean")).abs().max() < CLOSE
            )


def test_preempted_prompts_begin_anew(tmp_path: Path) -> None:
    """Too few pages for all: some go back to the queue in the middle of their prompts."""
    llm, references = build(
        tmp_path, "llama", "native", ["plain"], chunked_prefill_size=16, max_total_tokens=400, context_length=128
    )
    prompts = [[10 + (i * k) % 80 for i in range(100)] for k in range(1, 6)]
    with llm:
        for prompt, found in zip(prompts, llm.embed(prompts, "plain", pooling="mean"), strict=True):
            assert (
                torch.tensor(found.embedding).sub(references.embedding("plain", prompt, "mean")).abs().max() < CLOSE
            )
        llm.engine.check()


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"dimensions": 0}, BadRequest, "dimensions = 0"),
        ({"dimensions": 65}, BadRequest, "1 to 64"),
        ({"pooling": "max"}, BadRequest, "pooling = 'max'"),
        ({"lora_path": "nope"}, UnknownAdapter, "nope"),
    ],
)
def test_refusals(built: tuple[LLM, References], options: dict[str, Any], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        built[0].embed([5, 6], **options)
    with pytest.raises(BadRequest, match="empty"):
        built[0].embed([[]])
