"""What every tool-call parser does alike: text outside of calls, the events, and giving back what was no call.

A parser is in one of two modes. Outside of calls, text is content up to the next marker; only white space and a
possible beginning of a marker at the end of the text are held back. Inside, a format's own state reads character by
character; whatever it has taken since the last complete call is kept in `_taken` and becomes content if it fails:

    text     Let me look.\\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\\nDone.
    mode     |-- outside --|------------------- inside -------------------------------|- outside
    _taken                 |--------------------------------------------| then empty: the call has ended

Nothing is read twice, so the work is linear in the length of the answer. The format modules build on it.
"""

import re
from collections.abc import Callable, Sequence

from multilora.front.tools.base import (
    Arguments,
    CallAbandoned,
    CallEnded,
    CallStarted,
    Content,
    Event,
    NewId,
    openai_call_id,
)
from multilora.front.tools.definitions import Tool

MAX_HELD_SPACE = 256  # characters of white space before a call that count as its markup; more is content
_PIECE = 4096  # characters read at once: what a marker costs grows with the text around it

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')

# Reads one character inside a call. False: the parser is outside again and the character was not taken.
State = Callable[[str], bool]


class MarkerSearch:
    """Finds the first of several markers in text that arrives in pieces."""

    def __init__(self, markers: Sequence[str]):
        self._markers = tuple(markers)
        self._pattern = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
        self._longest = max(map(len, markers), default=1)
        self._firsts = {marker[0] for marker in markers}

    def find(self, text: str) -> re.Match[str] | None:
        return self._pattern.search(text) if self._markers else None

    def partial(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a marker."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if text[-length] in self._firsts and any(m.startswith(text[-length:]) for m in self._markers):
                return length
        return 0


class CallScanner:
    """Base of the parsers. A format gives its markers and implements `_opened`.

    tools: those the model was offered; new_id: makes the id of each call.
    """

    def __init__(self, tools: Sequence[Tool], new_id: NewId = openai_call_id, *, markers: Sequence[str] = ()):
        self._names = frozenset(tool.name for tool in tools)
        self._new_id = new_id
        self._markers = MarkerSearch(markers)
        self._events: list[Event] = []
        self._pieces: list[str] = []  # text of the event to come: arguments while a call is open, else content
        self._state: State | None = None  # None: outside of calls
        self._held = ""  # outside: white space and the possible beginning of a marker
        self._taken: list[str] = []  # inside: what becomes content if this is no call
        self._expected = ""  # inside: what has been read of a fixed text, see _expect
        self._after_call = False  # nothing but white space has come since the last call
        self._open = False  # a call has started and not ended
        self._count = 0  # calls started so far

    def push(self, text: str) -> list[Event]:
        """The events that `text`, the next piece of the answer, completes."""
        for start in range(0, len(text), _PIECE):
            self._read(text[start : start + _PIECE])
        return self._take_events()

    def _read(self, text: str) -> None:
        at = 0
        while at < len(text):
            if self._state is None:
                at = self._read_outside(text, at)
                continue
            run = _PLAIN.match(text, at) if self._in_string() else None
            if self._state(run.group() if run else text[at]):
                at = run.end() if run else at + 1

    def finish(self) -> list[Event]:
        """The events that the end of the answer completes."""
        if self._state is not None:
            self._fail()
        if not (self._after_call and self._held.isspace()):
            self._content(self._held)
        self._held = ""
        return self._take_events()

    def _opened(self, marker: str) -> None:
        """Sets the state in which the text after `marker` is read. Overridden by formats that have markers."""
        raise NotImplementedError

    def _in_string(self) -> bool:
        """Whether the state takes a run of characters that are plain in a JSON string as it takes one."""
        return False

    def _read_outside(self, text: str, at: int) -> int:
        """Reads text[at:] as far as the end of the first marker; returns where reading goes on."""
        buffer = self._held + text[at:]
        found = self._markers.find(buffer)
        end = found.start() if found else len(buffer) - self._markers.partial(buffer)
        kept = max(len(buffer[:end].rstrip()), end - MAX_HELD_SPACE)
        self._content(buffer[:kept])
        if found is None:
            self._held = buffer[kept:]
            return len(text)
        self._held = ""
        self._taken = [buffer[kept : found.end()]]
        self._opened(found.group())
        return len(text) - (len(buffer) - found.end())

    def _take(self, ch: str, state: State | None = None) -> bool:
        """Counts `ch` as read inside, goes on in `state` if one is given."""
        self._taken.append(ch)
        if state is not None:
            self._state = state
        return True

    def _expect(self, ch: str, *texts: str) -> str | None:
        """Reads one of `texts` after white space. The text once it is complete, "" before, None if none can come."""
        if not self._expected and ch.isspace():
            return "" if self._take(ch) else None
        read = self._expected + ch
        if not any(text.startswith(read) for text in texts):
            return None
        self._take(ch)
        self._expected = "" if read in texts else read
        return read if read in texts else ""

    def _start(self, name: str, call_id: str | None = None) -> None:
        self._emit(CallStarted(self._count, call_id or self._new_id(), name))
        self._open = True
        self._count += 1

    def _arguments(self, text: str) -> None:
        self._pieces.append(text)

    def _end(self) -> None:
        """The call is complete; what comes next is taken anew."""
        self._emit(CallEnded(self._count - 1))
        self._open = False
        self._after_call = True
        self._taken = []

    def _leave(self) -> bool:
        """Goes outside; what was taken since the last call is text like any other."""
        self._held = "".join(self._taken)
        self._reset()
        return False

    def _close(self) -> bool:
        """Goes outside; what was taken since the last call was its markup."""
        self._reset()
        return True

    def _fail(self) -> bool:
        """Goes outside; what was taken since the last call is content: it is no call."""
        text = "".join(self._taken)
        self._reset()
        if self._open:
            self._emit(CallAbandoned(self._count - 1, text))
            self._open = False
            self._after_call = False
        elif self._after_call and text.isspace():
            self._held = text
        else:
            self._content(text)
        return False

    def _reset(self) -> None:
        self._state = None
        self._taken = []
        self._expected = ""

    def _content(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._after_call = False

    def _emit(self, event: Event) -> None:
        self._join_pieces()
        self._events.append(event)

    def _join_pieces(self) -> None:
        """Pieces that no other event parts become one: of arguments while a call is open, else of content."""
        text = "".join(self._pieces)
        self._pieces = []
        if text:
            self._events.append(Arguments(self._count - 1, text) if self._open else Content(text))

    def _take_events(self) -> list[Event]:
        self._join_pieces()
        events, self._events = self._events, []
        return events
