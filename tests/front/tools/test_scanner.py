import pytest

from multilora.front.tools.base import Content
from multilora.front.tools.scanner import CallScanner, MarkerSearch


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("a", 0),
        ("a<", 1),
        ("a<to", 3),
        ("a<tool>", 0),
        ("[CALL", 5),
        ("[CALL]", 0),
        ("<<", 1),
        ("<to<t", 2),
        ("<[", 1),
        ("ool>", 0),
    ],
)
def test_the_possible_beginning_of_a_marker(text, length):
    assert MarkerSearch(["<tool>", "[CALL]"]).partial(text) == length


def test_the_first_marker():
    search = MarkerSearch(["<a>", "<a>b", "[x"])
    assert search.find("none") is None
    assert search.find("..[x <a>").group() == "[x"
    assert search.find("<a>b").group() == "<a>b"


def test_no_markers():
    search = MarkerSearch([])
    assert search.find("anything") is None
    assert search.partial("anything") == 0


def test_text_without_a_marker_is_held_back_only_where_one_may_begin():
    scanner = CallScanner((), markers=["<tool>"])
    assert scanner.push("a < b") == [Content("a < b")]
    assert scanner.push(" <") == []
    assert scanner.push("t \n") == [Content(" <t")]
    assert scanner.push("<tool") == []
    assert scanner.finish() == [Content(" \n<tool")]
