"""Charts: axes, places, names."""

from xml.etree import ElementTree

import pytest

from multilora.planner.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Line, svg, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("largest", [0.0007, 0.3, 1.0, 7.0, 64.0, 99.0, 5434.0, 1e6])
def test_ticks(largest):
    found = ticks(largest)
    assert 3 <= len(found) <= 9 and found[0] == 0 and found[-1] >= largest * 0.999999
    assert found[-2] < largest


def test_no_values():
    assert ticks(0) == [0.0, 1.0]


def test_places():
    lines = [Line("a <b>", [(1, 0), (64, 10)]), Line("c", [(1, 5), (64, 10)], dashed=True)]
    root = ElementTree.fromstring(svg([Chart("title & more", "x", lines, log_x=True, mark=(8, "here"))]))
    first, second = root.findall(f"{SVG}polyline")
    assert first.get("points").split()[0] == f"{LEFT:.1f},{HEIGHT - BOTTOM:.1f}"
    assert first.get("points").split()[1] == f"{WIDTH - RIGHT:.1f},{TOP:.1f}"
    assert second.get("stroke-dasharray")
    words = [text.text for text in root.findall(f"{SVG}text")]
    assert {"title & more", "a <b>", "here", "64"} <= set(words)
    middle = next(t for t in root.findall(f"{SVG}line") if t.get("stroke-dasharray"))
    assert float(middle.get("x1")) == pytest.approx(LEFT + (WIDTH - LEFT - RIGHT) / 2)
    names = [float(t.get("y")) for t in root.findall(f"{SVG}text") if t.text in ("a <b>", "c")]
    assert abs(names[0] - names[1]) >= 15


def test_several():
    chart = Chart("t", "x", [Line("a", [(0, 1), (1, 2)])])
    assert ElementTree.fromstring(svg([chart, chart])).get("height") == str(2 * HEIGHT)
