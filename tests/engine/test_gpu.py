"""The whole engine on a GPU, in bf16, with FlashInfer, Triton kernels, CUDA graphs and copies beside the steps.

In bf16 nobody promises equal tokens across batch sizes, so logprobs are judged: against transformers + PEFT in fp32
they may be off by no more than transformers + PEFT in bf16 (`tests/support/exactness.py`). Where two runs of the
engine are held against each other, token for token, both are in fp32: without FlashInfer and graphs, but with the
same LoRA kernels, copies and schedules. MULTILORA_TEST_DEVICE=cpu tries most of it out without a GPU.
"""

import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import SLACK, Judged, judge
from fakes.engine_driver import Answer, EngineDriver
from fakes.models import make_adapter, make_tiny_model

from multilora.attention.backends import make_attention
from multilora.batch import ForwardBatch
from multilora.engine.execution.cuda_graphs import GraphedStep
from multilora.engine.execution.runner import AdapterScope
from multilora.engine.memory import measure_step
from multilora.engine.messages import Sleep, WakeUp
from multilora.errors import OutOfMemory

DEVICE, DTYPE = os.environ.get("MULTILORA_TEST_DEVICE", "cuda"), "bfloat16"
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu] + [cuda] * (DEVICE == "cuda")

SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 128, "num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 128, "num_key_value_heads": 2},
    "mistral": {"head_dim": 64, "num_attention_heads": 6, "num_key_value_heads": 2},  # with a window
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "qv": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "seven": {"r": 16, "lora_alpha": 4, "target_modules": "all-linear"},
    "rslora": {"r": 64, "lora_alpha": 1, "target_modules": "all-linear", "use_rslora": True},
    "gate": {"r": 3, "lora_alpha": 3, "target_modules": ["gate_proj"]},
}
RANKS = (8, 16, 32, 64)  # of the twelve adapters that take turns
NEW_TOKENS = 16
WORST = 6.0  # times what transformers + PEFT in bf16 err in the mean: one right answer; a wrong one errs 30 times it
LENGTHS = (1, 5, 17, 64, 130)
CLOSE = 1e-3  # logprobs of two runs in fp32
EXACT = {"dtype": "float32"}


@dataclass(frozen=True)
class Family:
    path: Path
    prompts: list[list[int]]
    models: dict[str | None, Any]  # transformers and PEFT, fp32

    def driver(self, names: Any = ADAPTERS, **options: Any) -> EngineDriver:
        paths = {name: self.path / name for name in names}
        defaults = {"device": DEVICE, "dtype": DTYPE, "arena_bytes": 64 << 20, "max_running_requests": 8}
        return EngineDriver(self.path / "model", paths, **(defaults | options))

    def jobs(self) -> list[tuple[str | None, int]]:
        return [(name, prompt) for prompt in range(len(self.prompts)) for name in (None, *ADAPTERS)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    path = tmp_path_factory.mktemp(request.param)
    return make_family(path, request.param, ADAPTERS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """With twelve adapters of ranks 8 to 64."""
    ranks = {f"{i}": RANKS[i % len(RANKS)] for i in range(12)}
    configs = {
        name: {"r": rank, "lora_alpha": rank // 4, "target_modules": "all-linear"} for name, rank in ranks.items()
    }
    return make_family(tmp_path_factory.mktemp("llama"), "llama", configs)


def make_family(path: Path, name: str, adapters: dict[str, dict[str, Any]]) -> Family:
    models: dict[str | None, Any] = {None: make_tiny_model(path / "model", name, seed=3, **(SIZES | FAMILIES[name]))}
    for seed, (adapter, config) in enumerate(adapters.items()):
        models[adapter] = make_adapter(path / adapter, path / "model", seed=seed, dtype=DTYPE, **config)
    rng = random.Random(1)
    prompts = [[rng.randrange(3, SIZES["vocab_size"]) for _ in range(n)] for n in LENGTHS]
    prompts.append(prompts[-1][:100] + prompts[0])
    return Family(path, prompts, models)


def submit_all(driver: EngineDriver, family: Family, jobs: list[tuple[str | None, int]]) -> dict[str, tuple]:
    return {
        driver.submit(
            family.prompts[prompt], name, max_new_tokens=NEW_TOKENS, ignore_eos=True, return_logprob=True
        ): (name, prompt)
        for name, prompt in jobs
    }


def run(driver: EngineDriver, family: Family, jobs: list[tuple[str | None, int]]) -> dict[tuple, Answer]:
    rids = submit_all(driver, family, jobs)
    driver.run()
    return {job: driver.answers[rid] for rid, job in rids.items()}


def judged(family: Family, answers: Iterable[tuple[tuple, Answer]]) -> Judged:
    """answers: with the (adapter or None, prompt) that they answer."""
    found: dict[str | None, list[tuple[list[int], torch.Tensor]]] = {}
    for (name, prompt), answer in answers:
        whole = family.prompts[prompt] + answer.tokens
        found.setdefault(name, []).append((whole, torch.tensor(answer.logprobs)))
    return judge(family.models, found, DEVICE, getattr(torch, DTYPE))


def equal(found: Answer, expected: Answer) -> bool:
    """Token for token; logprobs but for rounding."""
    pairs = zip(found.logprobs, expected.logprobs, strict=True)
    return found.tokens == expected.tokens and all(abs(a - b) < CLOSE for a, b in pairs)


# ---------------------------------------------------------------------- against transformers + PEFT


@pytest.mark.parametrize("options", [{}, {"chunked_prefill_size": 48}, {"disable_cuda_graph": True}], ids=str)
def test_no_less_exact_than_transformers_and_peft_in_bf16(family: Family, options: dict[str, Any]) -> None:
    """Mixed adapters, prefix cache on; the second round finds its prompts in the cache."""
    driver = family.driver(**options)
    for cached in (False, True):
        answers = run(driver, family, family.jobs())
        assert (sum(a.cached_tokens for a in answers.values()) > 0) >= cached
        found = judged(family, answers.items())
        assert 0 < found.error <= SLACK * found.theirs
    driver.close()


@pytest.mark.parametrize("eager", [False, True])
def test_no_less_exact_in_batches_of_any_size(llama: Family, eager: bool) -> None:
    """Of a captured size and of sizes between, all ranks, base and adapters in one step or only base."""
    names = list(llama.models)
    driver = llama.driver(names[1:], disable_cuda_graph=eager)
    answers: list[tuple[tuple, Answer]] = []
    for count in (1, 3, 8):
        for mix in ([None], names[:1] + names[1:7], names[7:]):
            jobs = [(mix[i % len(mix)], i % len(llama.prompts)) for i in range(count)]
            answers += run(driver, llama, jobs).items()
    driver.close()
    found = judged(llama, answers)
    assert 0 < found.error <= SLACK * found.theirs
    assert found.worst <= WORST * found.theirs


@cuda
def test_small_steps_with_prompts_are_replayed_and_give_what_launches_give(llama: Family) -> None:
    """Sizes up and down, LoRA and base in turns, compositions, decodes among prompts."""
    names = list(llama.models)[1:]
    mixes: list[list[Any]] = [[names[0]], [None], [names[3], None, names[1]], [{names[2]: 0.5, names[5]: -1.0}]]
    driver = llama.driver(names, disable_radix_cache=True)
    runner = driver.engine.runner
    graphs, replayed = runner._graphs, []
    assert graphs is not None
    prepare = graphs.prepare

    class Compared:
        """The step as it is replayed, held against its launches."""

        def __init__(self, step: GraphedStep, batch: ForwardBatch):
            self._step, self._batch = step, batch

        def run(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self._step.run(x)
            replayed.append(len(x))
            launched = runner._layers(x, self._batch, AdapterScope.LAYERS)
            error = (hidden - launched).float().norm() / launched.float().norm()
            assert error < 2e-2, (len(x), error)
            return hidden

    def compare(batch: ForwardBatch, *, decodes: bool) -> GraphedStep | None:
        step = prepare(batch, decodes=decodes)
        return step if step is None or decodes else Compared(step, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "prepare", compare)
        for prompt in (4, 1, 2, 0, 3, 4):
            for mix in mixes:
                for name in mix:
                    driver.submit(llama.prompts[prompt], name, max_new_tokens=3, ignore_eos=True)
                driver.step()  # the next ones come while these decode
        driver.run()
    driver.close()
    assert len(replayed) > 5 and max(replayed) > 128 and min(replayed) < 32


# ---------------------------------------------------------------------- adapters that come and go


def test_eviction_and_reload_under_load(llama: Family) -> None:
    """With FlashInfer and graphs: no answer is of another adapter."""
    found = judged(llama, take_turns(llama))
    assert found.error <= SLACK * found.theirs
    assert found.worst <= WORST * found.theirs


def test_eviction_and_reload_change_no_token(llama: Family) -> None:
    names = list(llama.models)[1:]
    roomy = llama.driver(names, **EXACT)
    expected = run(roomy, llama, [(name, prompt) for name in llama.models for prompt in range(len(llama.prompts))])
    assert roomy.evictions == 0
    roomy.close()
    for prompt in range(len(llama.prompts)):
        others = [equal(expected[name, prompt], expected[None, prompt]) for name in names]
        assert not any(others), "an adapter does nothing: who would notice that it is another one?"
    for job, answer in take_turns(llama, **EXACT):
        assert equal(answer, expected[job]), job


def take_turns(llama: Family, **options: Any) -> list[tuple[tuple, Answer]]:
    """Twelve adapters take turns in room for the largest and little more, while requests keep coming."""
    names = list(llama.models)[1:]
    rng = random.Random(0)
    jobs = [(name, prompt) for name in (None, *names) for prompt in range(len(llama.prompts))]
    with_room = llama.driver(names, **options)
    most = max(info.nbytes for info in with_room.infos.values())
    with_room.close()
    driver = llama.driver(names, lora_device_bytes=int(1.5 * most), chunked_prefill_size=96, **options)
    rids: list[tuple[tuple, str]] = []
    for _ in range(2):
        rng.shuffle(jobs)
        for i in range(0, len(jobs), 6):
            rids += [(job, rid) for rid, job in submit_all(driver, llama, jobs[i : i + 6]).items()]
            for _ in range(rng.randrange(4)):
                driver.step()
        driver.run()
    assert driver.evictions > len(names)
    driver.close()
    return [(job, driver.answers[rid]) for job, rid in rids]


def test_adapters_arrive_while_others_decode(llama: Family) -> None:
    """Streams are not disturbed, and what arrived is right from its first token on."""
    names = list(llama.models)[1:]
    streams = [(name, prompt) for prompt, name in enumerate((None, *names[:3]))]
    late = [(name, prompt) for prompt, name in enumerate(names[4:10], start=1) if prompt < len(llama.prompts)]
    quiet = llama.driver(names, **EXACT)
    expected = run(quiet, llama, streams) | run(quiet, llama, late)
    quiet.close()
    driver = llama.driver(names[:3], **EXACT)
    rids = submit_all(driver, llama, streams)
    for name, prompt in late:
        driver.step()
        driver.load(name, llama.path / name)  # steps on until it is there
        rids |= submit_all(driver, llama, [(name, prompt)])
    driver.run()
    for rid, job in rids.items():
        assert equal(driver.answers[rid], expected[job]), job
    driver.close()


# ---------------------------------------------------------------------- memory


@cuda
@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_the_device_and_the_graphs_are_captured_again(llama: Family, level: int) -> None:
    """bf16 with graphs: the answers after waking up are the same, bit by bit, as steps of equal shape are."""
    names = list(llama.models)[1:4]
    driver = llama.driver(names, arena_bytes=512 << 20)
    prompt, wanted = llama.prompts[2], {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    before = {name: driver.complete(prompt, name, **wanted).tokens for name in (None, *names)}
    awake = torch.cuda.memory_reserved()  # of this process: other tests use the device, too
    driver.engine.handle(Sleep(call=0, level=level, mode="keep", tags=["kv_cache", "weights"]))
    for _ in range(20):
        driver.step()
    assert awake - torch.cuda.memory_reserved() >= 512 << 20
    driver.engine.handle(WakeUp(0, ["kv_cache", "weights"]))
    for _ in range(20):
        driver.step()
    assert {name: driver.complete(prompt, name, **wanted).tokens for name in before} == before
    assert driver.engine.runner._graphs is not None
    driver.close()


@cuda
def test_the_largest_step_is_measured(llama: Family, caplog: pytest.LogCaptureFixture) -> None:
    """A step takes at least the logits of its tokens; the arena gets what is left of the rest."""
    with caplog.at_level("INFO", "multilora.engine"):
        driver = llama.driver([], chunked_prefill_size=256)
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("memory:")]
    assert "a step" in line and "CUDA graphs" in line
    device = torch.device(DEVICE)
    model, layout = driver.engine.runner._model, driver.engine.runner._model.kv_layout(16)

    def over_arena(kv_views: Any) -> Any:
        return make_attention("torch", kv_views, model.attention_shape)

    sizes = [measure_step(model, layout, over_arena, tokens, 8) for tokens in (64, 256)]
    assert sizes[0] >= 64 * SIZES["vocab_size"] * 4
    assert sizes[1] > 2 * sizes[0]
    assert torch.cuda.memory_allocated(device) > 0
    driver.close()


@cuda
def test_an_arena_that_does_not_fit_says_what_asked_for_how_much(llama: Family) -> None:
    with pytest.raises(OutOfMemory, match=r"arena asks for 1\d+\.0 GiB \(--arena-bytes\).*lower --arena-bytes"):
        llama.driver([], arena_bytes=1 << 40)
