"""The GRPO example, a few steps of it: publishing, rollouts and the trainer have to mean the same model."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
START_SECONDS = 400
TOLERANCE = 1e-3  # of a logprob, trainer against rollout
# of PEFT and transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def rl():
    """The example's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from examples.rl import grpo

        yield grpo


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A real server on the bundled model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "multilora", "serve", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--enable-lora", "--dtype", "float32"], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT
        )
    try:
        _wait(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _wait(url, process, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text()}")


@pytest.fixture(params=["in_process", pytest.param("over_http", marks=pytest.mark.slow)])
def rollouts(request, rl):
    found = rl.InProcess() if request.param == "in_process" else rl.OverHttp(request.getfixturevalue("url"))
    yield found
    found.close()


def small(rl, **changes):
    return rl.Settings(steps=2, prompts=3, group=4, held_out=6, **changes)


@pytest.mark.slow
def test_each_step_publishes_a_version_that_the_trainer_agrees_with(rl, rollouts):
    loop = rl.Loop(small(rl), rollouts)
    loop.publish(0)
    assert rollouts.loaded() == {"policy-v0": "__tensor__"}
    steps = list(loop.steps())
    assert [step.step for step in steps] == [1, 2]
    assert all(step.mismatch < TOLERANCE for step in steps)
    assert all(0 <= step.reward <= 1 for step in steps)
    assert rollouts.loaded() == {"policy-v2": "__tensor__"}  # the old versions are gone


def test_rollouts_come_from_the_weights_that_were_published_last(rl, rollouts):
    loop = rl.Loop(small(rl), rollouts)
    loop.publish(0)  # B is zero: the base model
    prompt = list(loop._prompt((3, 4)))
    params = {"temperature": 1.0, "max_new_tokens": 8, "sampling_seed": 1}
    ((of_base, *_),) = rollouts.sample([prompt], 2, params)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in loop.trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    loop.publish(1)
    (answers,) = rollouts.sample([prompt], 3, params)
    with torch.no_grad():
        now, mask = loop.trainer.logprobs(answers)
        before, _ = loop.trainer.logprobs([of_base])
    for row, answer in enumerate(answers):
        assert now[row][mask[row]].tolist() == pytest.approx(answer.logprobs, abs=TOLERANCE)
        assert len(answer.logprobs) == len(answer.token_ids)
    assert before[0].tolist() != pytest.approx(of_base.logprobs, abs=0.1)  # those weights are another model


@pytest.mark.slow
def test_both_ways_sample_the_same_tokens(rl, url):
    settings = small(rl)
    params = {"temperature": 1.0, "max_new_tokens": 8, "sampling_seed": 7}
    found = []
    for rollouts in (rl.InProcess(), rl.OverHttp(url)):
        loop = rl.Loop(settings, rollouts)
        loop.publish(0)
        found.append(rollouts.sample([loop._prompt((1, 2)), loop._prompt((5, 5))], 3, params))
        rollouts.close()
    ours, theirs = ([[r.token_ids for r in group] for group in groups] for groups in found)
    assert ours == theirs


def test_the_reward_is_for_the_right_sum_of_an_answer_that_ended(rl):
    def answer(text, complete=True):
        return rl.Rollout([1], [2], [0.0], text, complete)

    assert rl.reward((3, 4), answer(" 3 plus 4 is 7.")) == 1
    assert rl.reward((3, 4), answer(" 3 plus 4 is 7.", complete=False)) == 0
    assert rl.reward((3, 4), answer(" 3 plus 4 is 8.")) == 0
    assert rl.reward((3, 4), answer(" Arr, matey!")) == 0


def test_advantages_are_standardised_within_a_group(rl):
    found = rl.advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert found[0].mean().abs() < 1e-6
    assert found[0].std() == pytest.approx(1, abs=1e-3)
    assert found[1].tolist() == [0, 0, 0, 0]


def test_the_held_out_sums_are_never_trained_on(rl):
    loops = [rl.Loop(small(rl, seed=seed), rollouts=None) for seed in (0, 0, 1)]
    assert all(set(loop._trained).isdisjoint(loop._held_out) for loop in loops)
    assert len(loops[0]._trained) + len(loops[0]._held_out) == 100
    assert loops[0]._held_out == loops[1]._held_out != loops[2]._held_out


def test_the_results_are_json_and_svg(rl, tmp_path):
    steps = [rl.Step(i, i / 10, 0.0, 1e-6, 100, 0.5) for i in range(1, 8)]
    rl.write_results(tmp_path, rl.Settings(), steps, 0.25, 1.0)
    data = json.loads((tmp_path / "rewards.json").read_text())
    assert [step["reward"] for step in data["steps"]] == [i / 10 for i in range(1, 8)]
    assert data["held_out_accuracy"] == {"before": 0.25, "after": 1.0}
    root = ElementTree.fromstring((tmp_path / "rewards.svg").read_text())
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [7, 7]
