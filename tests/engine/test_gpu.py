"""The whole engine on a GPU, in bf16, with FlashInfer, Triton kernels, CUDA graphs and copies beside the steps.

In bf16 nobody promises equal tokens across batch sizes, so logprobs are judged: against transformers + PEFT in fp32
they may be off by no more than transformers + PEFT in bf16 (`tests/support/exactness.py`). Where two runs of the
engine are held against each other, token for token, both are in fp32: without FlashInfer, but with the same decodes,
LoRA kernels, graphs, copies and schedules. MULTILORA_TEST_DEVICE=cpu tries most of it out without a GPU.
"""

import random
from typing import Any

import pytest
import torch
from exactness import SLACK
from fakes.engine_driver import Answer
from gpu_family import (
    ADAPTERS,
    DEVICE,
    EXACT,
    FAMILIES,
    NEW_TOKENS,
    SIZES,
    Family,
    equal,
    judged,
    make_family,
    run,
    submit_all,
)

from multilora.attention.backends import make_attention
from multilora.batch import ForwardBatch
from multilora.engine.execution.cuda_graphs import GraphedStep
from multilora.engine.execution.runner import AdapterScope
from multilora.engine.memory import measure_step
from multilora.engine.messages import Sleep, WakeUp
from multilora.errors import OutOfMemory

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu] + [cuda] * (DEVICE == "cuda")

RANKS = (8, 16, 32, 64)  # of the twelve adapters that take turns
WORST = 6.0  # times what transformers + PEFT in bf16 err in the mean: one right answer; a wrong one errs 30 times it


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
def test_steps_with_prompts_are_replayed_and_give_what_launches_give(llama: Family) -> None:
    """Sizes up and down, LoRA and base in turns, compositions, decodes among prompts, prompts of six at a time."""
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
        for mix in ([names[0]] * 6, [None] * 6, [None, *names[4:9]]):
            for name in mix:
                driver.submit(llama.prompts[4], name, max_new_tokens=3, ignore_eos=True)
            driver.run()
    driver.close()
    assert len(replayed) > 8 and max(replayed) > 512 and min(replayed) < 32


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
    with pytest.raises(OutOfMemory, match=r"arena asks for 1\d+\.\d GiB \(--arena-bytes\).*lower --arena-bytes"):
        llama.driver([], arena_bytes=1 << 40)
