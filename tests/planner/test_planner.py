"""Plans: what they answer, and how they move with what is asked.

Covers `advice.py` and `plot.py` too.
"""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from bench.gpu.sizes import write_model
from multilora import LLM
from multilora.errors import ConfigError
from multilora.planner import planner as planning
from multilora.planner.advice import advise
from multilora.planner.facts import model_facts
from multilora.planner.planner import Planner, Workload, plan
from multilora.planner.plot import plot
from scripts.calibrate_planner import DIMS, llama

QUICK = Workload("8b", adapters=32, prompt=64, answer=16)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer requests and rates; the 8B model without files."""
    monkeypatch.setattr(planning, "REQUESTS", 100)
    monkeypatch.setattr(planning, "SHARES", (0.5, 0.9))
    monkeypatch.setattr(planning, "HALVINGS", 3)
    monkeypatch.setattr(planning, "model_facts", lambda *_, **__: llama())


def test_a_plan():
    found = plan(QUICK)
    assert found.measured and found.bound == "slots"
    assert found.adapter_bytes == 80 << 20 and found.host_bytes_needed == 32 * found.adapter_bytes
    assert found.device_adapters > 32
    assert found.most_tokens == pytest.approx(found.most_rps * 16)
    assert 0 < found.breaks_at <= found.most_rps
    assert found.at.rps == pytest.approx(0.7 * found.most_rps)
    assert [p.rps for p in found.curve] == pytest.approx([0.5 * found.most_rps, 0.9 * found.most_rps])
    low, high = found.curve
    assert low.first_token_p50 < high.first_token_p50 < high.first_token_p99
    assert low.tokens_per_second < high.tokens_per_second


def test_the_same_question_has_the_same_answer():
    assert plan(QUICK) == plan(QUICK)


def test_a_slower_gpu_breaks_earlier():
    fast, slow = plan(QUICK), plan(replace(QUICK, gpu="a100-80g"))
    assert slow.most_rps < fast.most_rps and slow.breaks_at < fast.breaks_at and not slow.measured


def test_two_gpus(monkeypatch):
    monkeypatch.setattr(planning, "model_facts", lambda *_, tp_size, **__: llama("llama-8b", tp_size))
    one, two = plan(QUICK), plan(replace(QUICK, tp_size=2, rps=10_000))
    assert two.measured and two.most_rps > one.most_rps
    assert two.weights_bytes < 0.51 * one.weights_bytes
    assert two.host_bytes_needed == 2 * 32 * two.adapter_bytes
    assert "the 2 GPUs'" in two.advice[0].why
    assert not plan(replace(QUICK, tp_size=4)).measured


def test_too_many_requests():
    found = plan(replace(QUICK, rps=10_000))
    assert "take" in found.advice[0].why and found.advice[0].flag == ""
    assert found.breaks_at < 10_000


def test_too_many_adapters():
    flags = [a.flag for a in advise(Planner(replace(QUICK, adapters=5000, host_bytes=8 << 30)), 1.0)]
    assert flags[:2] == ["--max-loaded-loras", "--lora-host-bytes"]
    assert "--lora-host-bytes" not in [a.flag for a in advise(Planner(QUICK), 1.0)]


def test_flags_that_help():
    few = Planner(replace(QUICK, max_running_requests=8))
    [advice] = [a for a in advise(few, 1.0) if a.flag.startswith("--max-running-requests")]
    assert "instead of" in advice.why
    long = Planner(replace(QUICK, prompt=4000, chunked_prefill_size=256))
    assert any(a.flag.startswith("--chunked-prefill-size") for a in advise(long, 0.6 * long.most_rps))


def test_memory_that_is_too_small(monkeypatch, tmp_path):
    tight = replace(QUICK, gpu="a100-40g", adapters=1, prompt=100, answer=100, mem_fraction_static=0.05)
    with pytest.raises(ConfigError, match="does not fit the arena"):
        plan(replace(tight, prompt=8000, mem_fraction_static=0.02))
    path = write_model(tmp_path / "model", DIMS)
    monkeypatch.setattr(planning, "model_facts", model_facts)
    small = Planner(replace(tight, model_path=path))
    assert small.bound == "memory"
    assert "--kv-cache-dtype fp8_e4m3" in [advice.flag for advice in advise(small, 0.1)]


def test_without_adapters():
    found = plan(replace(QUICK, adapters=0))
    assert found.host_bytes_needed == 0 and found.at.copies == 0


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("tp_size", 0, "--tp-size"),
        ("rank", 0, "--rank"),
        ("prompt", 0, "--prompt"),
        ("adapters", -1, "--adapters"),
        ("rps", 0.0, "--rps"),
        ("rps", float("nan"), "--rps"),
        ("first_token", -1.0, "--first-token"),
        ("skew", -1.0, "--skew"),
        ("mem_fraction_static", 1.5, "--mem-fraction-static"),
        ("max_running_requests", 0, "--max-running-requests"),
    ],
)
def test_bad_questions(field, value, named):
    with pytest.raises(ConfigError, match=named):
        replace(QUICK, **{field: value})


def test_a_context_that_is_too_short():
    with pytest.raises(ConfigError, match="exceed the model's context of 8192"):
        Planner(replace(QUICK, prompt=9000))


def test_the_python_door():
    found = LLM.plan("8b", adapters=32, prompt=64, answer=16)
    assert found == plan(QUICK)
    with pytest.raises(ConfigError, match="--gpu tpu"):
        LLM.plan("8b", gpu="tpu")


def test_the_picture():
    root = ElementTree.fromstring(plot(plan(QUICK)))
    words = "".join(root.itertext())
    assert "32 adapters of rank 16" in words and "breaks at" in words and "99th percentile" in words
