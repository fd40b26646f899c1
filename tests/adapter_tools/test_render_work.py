"""What the tools write for people."""

import math

from multilora.adapter_tools import render_work
from multilora.adapter_tools.bench import AdapterCost, StepCosts
from multilora.adapter_tools.convert.convert import Conversion
from multilora.adapter_tools.diff import AdapterDiff, ModuleDiff


def test_a_difference():
    modules = [
        ModuleDiff("a", 1.0, 1.5, 0.5, 0.75, (4, 8)),
        ModuleDiff("b", None, 2.0, None, None, (None, 8)),
        ModuleDiff("c", 2.0, None, None, None, (8, None)),
        ModuleDiff("d", 0.0, 2.0, math.inf, None, (8, 8)),
        ModuleDiff("e", 1.0, 1.0, 0.0, 1.0, (8, 8)),
        ModuleDiff("f", 1.0, 1.0, None, None, (8, 8)),
    ]
    text = render_work.difference(AdapterDiff("x", "y", {"r": (4, 8)}, modules, 0.25))
    assert text.splitlines()[0] == "r: 4 → 8"
    for words in (
        "50.000%",
        "new",
        "gone",
        "from nothing",
        "another shape",
        "4 → 8",
        "25.00% of the whole changed; 1 of 6",
    ):
        assert words in text
    assert not any(line.split()[:1] == ["e"] for line in text.splitlines())


def test_names_cannot_steer_the_terminal():
    text = render_work.converted(Conversion("\x1b[2J", "PEFT", 1, 2, ["a\x07note"]))
    assert "\x1b" not in text and "\x07" not in text and text.count("\n") == 1


def test_costs():
    cost = AdapterCost(
        "a", "m", "cpu", "float32", 8, 2048, 0.5, 3.0, 128, [StepCosts(8, 2.0, 3.0)], [StepCosts(8, 4.0, 4.0)]
    )
    text = render_work.cost(cost)
    assert "2 KiB" in text and "500 ms" in text and "+50.0 %" in text and "+0.0 %" in text
