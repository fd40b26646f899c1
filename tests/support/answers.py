"""Reading answers with the parsers of `multilora.front.tools` in tests: whole, cut anywhere, or cut everywhere."""

import itertools
from collections.abc import Callable, Iterable, Sequence

from hypothesis import strategies as st

from multilora.front.tools.base import Arguments, CallStarted, Content, Event, NewId, Reasoning, collect
from multilora.front.tools.definitions import Tool, parse_tools


def tool(name: str, **properties: dict) -> dict:
    """A tool as a request has it."""
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


TOOLS: list[Tool] = parse_tools(
    [
        tool("get_weather", city={"type": "string"}, unit={"enum": ["C", "F"]}, days={"type": "integer"}),
        tool("search", query={"type": "string"}, limit={"type": "integer"}, tags={"type": "array"}),
        tool("get_time"),
    ]
)


def counter() -> NewId:
    """Ids id0, id1, …"""
    numbers = itertools.count()
    return lambda: f"id{next(numbers)}"


def read(parser, pieces: Iterable[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.push(piece)]
    return events + parser.finish()


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with neighbours of one kind made one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        match last, event:
            case (Content(a), Content(b)):
                out[-1] = Content(a + b)
            case (Reasoning(a), Reasoning(b)):
                out[-1] = Reasoning(a + b)
            case (Arguments(i, a), Arguments(j, b)) if i == j:
                out[-1] = Arguments(i, a + b)
            case _:
                out.append(event)
    return out


def answer_of(make: Callable, text: str) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and arguments of each call; the same whether the text comes whole or by the character."""
    events = read(make(TOOLS, counter()), [text])
    assert joined(read(make(TOOLS, counter()), text)) == joined(events)
    answer = collect(events)
    return answer.content, [(call.name, call.arguments) for call in answer.calls]


def cut(text: str, places: Sequence[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def answers(*fragments: str) -> st.SearchStrategy[str]:
    """Texts of the fragments in any order, with anything between them."""
    part = st.sampled_from(fragments) | st.text(max_size=4) | st.sampled_from([" ", "\n", "<", "[", "{", "}", '"'])
    return st.lists(part, max_size=16).map("".join)


PLACES = st.lists(st.integers(0, 2000), max_size=12)


def check_contract(make: Callable, text: str, places: Sequence[int]) -> None:
    """What holds for every parser and every text."""
    events = read(make(TOOLS, counter()), [text])
    assert joined(read(make(TOOLS, counter()), cut(text, places))) == joined(events)
    answer = collect(events)
    if not answer.calls:
        assert answer.content == text
    letters = iter(text)
    assert all(ch in letters for ch in answer.content), "content is not a part of the text, in its order"
    started = [event.index for event in events if isinstance(event, CallStarted)]
    assert started == list(range(len(started)))
