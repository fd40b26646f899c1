"""The main parts of `scripts.hostile.points` and `scripts.hostile.hammer`, on real servers."""

import pytest

from scripts.hostile.hammer import ENDED, KILLED, QUIET, Hammer, hammer
from scripts.hostile.points.__main__ import FEW_DESCRIPTORS, measure
from scripts.hostile.points.record import PLAIN, POINTS, TIGHT, Point, Record
from scripts.hostile.target import Target, own_server

LIMIT_MS = 10_000.0  # beside other tests
LONG = {
    "connections that never send",
    "as many sequences as the defaults admit",
    "different schemas of 300 properties",
}
ALONE = (7, 13, 16)


def of(flags: tuple[str, ...]) -> list[Point]:
    return [point for point in POINTS if point.work and point.flags == flags and point.name not in LONG]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("points") / "log")


@pytest.fixture(scope="module")
def plain(log):
    with own_server(log, "--device", "cpu", *PLAIN, prefix=FEW_DESCRIPTORS) as target:
        yield target


@pytest.fixture(scope="module")
def tight(log):
    with own_server(log, "--device", "cpu", *TIGHT, prefix=FEW_DESCRIPTORS) as target:
        yield target


@pytest.mark.slow
@pytest.mark.parametrize("point", of(PLAIN), ids=lambda point: f"{point.number} {point.name}")
def test_a_point_is_mended(point, plain):
    assert measure(point, Record(), plain, LIMIT_MS)


@pytest.mark.slow
@pytest.mark.parametrize("point", of(TIGHT), ids=lambda point: f"{point.number} {point.name}")
def test_a_point_is_mended_where_limits_are_others(point, tight):
    assert measure(point, Record(), tight, LIMIT_MS)


@pytest.mark.slow
@pytest.mark.parametrize("number", ALONE)
def test_a_point_about_processes_is_mended(number, log):
    (point,) = (point for point in POINTS if point.alone and point.number == number)
    assert measure(point, Record(log=log))


@pytest.mark.slow
def test_front_processes_answer_every_short_connection(tmp_path):
    log = tmp_path / "log"
    with own_server(str(log), "--device", "cpu", "--enable-lora", "--front-workers", "2") as target:
        assert hammer(target, 12, 2, log)


def test_every_point_of_the_list_is_tried():
    assert {point.number for point in POINTS} == set(range(1, 23))


def test_a_point_is_good_when_all_of_it_is():
    record = Record()
    assert not record.good  # nothing was tried
    record.expect("a", 200, 200, 400)
    record.count("b", [200, 200])
    assert [good for good, *_ in record.lines] == [True, False]
    assert record.lines[1][2] == "2 × 200" and not record.good
    assert record.lines[0] == (True, "a", "200")


def test_a_server_that_does_not_answer_is_bad(capsys):
    def work(target: Target, record: Record) -> None:
        raise AssertionError("no answer")

    def alone(record: Record) -> None:
        work(Target("", 0, 0), record)

    assert not measure(Point(99, "none", None, alone), Record())
    assert "99 BAD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("phase", "end", "good"),
    [
        (QUIET, "200", True),
        (QUIET, "404", True),
        (QUIET, "503", False),
        (QUIET, "200 with an error", False),
        (QUIET, "ConnectionResetError", False),
        (KILLED, "ConnectionResetError", True),
        (KILLED, "503", False),
        (KILLED, "timeout", False),
        (ENDED, "503", True),
        (ENDED, "500", False),
        (ENDED, "timeout", False),
    ],
)
def test_what_the_hammer_takes_for_a_fault(phase, end, good):
    found = Hammer(Target("", 0, 0))
    found.found[f"/generate {end}"] += 1
    assert (not found.faults(phase)) == good
