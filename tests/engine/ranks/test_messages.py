"""What travels between ranks comes back as it was; plans have a property test of their own."""

from pathlib import Path

import pytest

from multilora.config import Config
from multilora.engine.messages import Shutdown, UseTokenizer
from multilora.engine.plan import Chunk, LoraInstall, LoraRemoval, StepPlan
from multilora.engine.ranks import messages
from multilora.lora.panels import AdapterShape, FullWeightShape

SHAPE = AdapterShape(((4, 0), (8,)), ((0, 3), (1,)), (FullWeightShape(-1, "lm_head", 2, 64, (3, 99)),))
PLAN = StepPlan(7, [Chunk(0, 4, 2, [5, 6], (1,), (0.5,))], lora=[LoraInstall(1, SHAPE, [4, 9]), LoraRemoval(0)])


@pytest.mark.parametrize(
    "message",
    [
        messages.RankStart(
            config=Config.make(lora_paths=["a=/a"], tp_size=2), rank=1, directory="/tmp/x", ahead=None
        ),
        messages.RunStep(PLAN),
        messages.CopyPages([3, 4, 8]),
        messages.ModuleFacts(3, "down_proj", 16),
        UseTokenizer("{}"),
        Shutdown(),
    ],
)
def test_to_a_rank(message: messages.ToRank) -> None:
    assert messages.decode_to_rank(messages.encode(message)) == message


@pytest.mark.parametrize("message", [messages.Joining(1), messages.Up(2), messages.Broken(1, "ConfigError", "no")])
def test_from_a_rank(message: messages.FromRank) -> None:
    assert messages.decode_from_rank(messages.encode(message)) == message


def test_progress_is_seen_by_all(tmp_path: Path) -> None:
    ours = messages.RankProgress(str(tmp_path), 3, create=True)
    theirs = messages.RankProgress(str(tmp_path), 3)
    theirs.steps[2] = 41
    theirs.copies[1] += 1
    assert (ours.steps.tolist(), ours.copies.tolist()) == ([0, 0, 41], [0, 1, 0])
