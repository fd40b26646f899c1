"""JSON that arrives character by character: an object's members, and the call that such an object may describe.

Stricter and laxer than `json.loads` in one point each: NaN and infinities are refused, and a raw control character in
a string is accepted and escaped, because models write code into arguments with real line breaks.
"""

import json
import re
from collections.abc import Callable

from multilora.front.tools import json_text

MAX_DEPTH = 128  # of nested brackets: deeper JSON is taken as malformed
_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE")
_WORDS = {"t": "true", "f": "false", "n": "null"}
_HEX = frozenset("0123456789abcdefABCDEF")
_ARGUMENT_KEYS = ("arguments", "parameters")
_CALL_KEYS = frozenset(("name", "type", "id", *_ARGUMENT_KEYS))

# Takes a character and returns it as strict JSON has it; None: the text is not JSON.
_State = Callable[[str], str | None]


class JsonObject:
    """Reads one JSON object, the first character fed being its "{".

    key: of the outermost member being read, once the key is complete; item: the text of that member's value so far;
    closed: (key, value text) of the member that the last character completed; done: the object is complete.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self.item: list[str] | None = None
        self.closed: tuple[str, str] | None = None
        self.done = False
        self._state: _State = self._first
        self._stack: list[str] = []  # open brackets
        self._keys: set[str] = set()  # of the outermost members
        self._token = ""  # the number or word being read
        self._in_key = False
        self._item_ends = False
        self._hex_left = 0

    @property
    def in_string(self) -> bool:
        """What comes next is inside a string, so that a run of plain characters can be fed like one."""
        return self._state == self._string

    def feed(self, ch: str) -> str | None:
        """The character, escaped if JSON wants it so; None: not JSON, or an outermost key that came before."""
        self.closed = None
        text = self._state(ch)
        if text is None or self.item is None:
            return text
        self.item.append(text)
        return text if not self._item_ends or self._close_item() else None

    def _close_item(self) -> bool:
        """The outermost key or value being read is complete. False: the key came before."""
        text = "".join(self.item or ())
        self.item = None
        self._item_ends = False
        if self.key is not None:
            self.closed = (self.key, text)
            self.key = None
            return True
        self.key = json.loads(text)
        known = self.key in self._keys
        self._keys.add(self.key)
        return not known

    def _first(self, ch: str) -> str | None:
        return self._push(ch, self._first_key) if ch == "{" else None

    def _push(self, ch: str, state: _State) -> str | None:
        self._stack.append(ch)
        self._state = state
        return ch if len(self._stack) <= MAX_DEPTH else None

    def _pop(self, ch: str) -> str | None:
        if self._stack.pop() + ch not in ("{}", "[]"):
            return None
        self.done = not self._stack
        self._end_value()
        return ch

    def _end_value(self) -> None:
        self._state = self._after_value
        self._item_ends = len(self._stack) == 1

    def _value(self, ch: str) -> str | None:
        if ch in _SPACE:
            return ch
        if len(self._stack) == 1:
            self.item = []
        if ch == "{":
            return self._push(ch, self._first_key)
        if ch == "[":
            return self._push(ch, self._first_item)
        self._token = ch
        if ch == '"':
            self._state = self._string
        elif ch in _WORDS:
            self._state = self._word
        elif ch == "-" or ch in "0123456789":
            self._state = self._number
        else:
            return None
        return ch

    def _first_item(self, ch: str) -> str | None:
        return self._pop(ch) if ch == "]" else self._value(ch)

    def _first_key(self, ch: str) -> str | None:
        return self._pop(ch) if ch == "}" else self._next_key(ch)

    def _next_key(self, ch: str) -> str | None:
        if ch in _SPACE:
            return ch
        if ch != '"':
            return None
        if len(self._stack) == 1:
            self.item = []
        self._in_key = True
        self._state = self._string
        return ch

    def _colon(self, ch: str) -> str | None:
        if ch == ":":
            self._state = self._value
            return ch
        return ch if ch in _SPACE else None

    def _string(self, ch: str) -> str | None:
        if ch == '"':
            if self._in_key:
                self._in_key = False
                self._state = self._colon
                self._item_ends = len(self._stack) == 1
            else:
                self._end_value()
        elif ch == "\\":
            self._state = self._escape
        elif ch < " ":
            return json.dumps(ch)[1:-1]
        return ch

    def _escape(self, ch: str) -> str | None:
        self._hex_left = 4 if ch == "u" else 0
        self._state = self._hex if ch == "u" else self._string
        return ch if ch in '"\\/bfnrtu' else None

    def _hex(self, ch: str) -> str | None:
        self._hex_left -= 1
        if not self._hex_left:
            self._state = self._string
        return ch if ch in _HEX else None

    def _word(self, ch: str) -> str | None:
        self._token += ch
        word = _WORDS[self._token[0]]
        if self._token == word:
            self._end_value()
        return ch if word.startswith(self._token) else None

    def _number(self, ch: str) -> str | None:
        if ch in _NUMBER_CHARACTERS:
            self._token += ch
            return ch
        if not _NUMBER.fullmatch(self._token):
            return None
        if len(self._stack) == 1:  # `ch` is no part of the number
            self._close_item()
        self._state = self._after_value
        return self._after_value(ch)

    def _after_value(self, ch: str) -> str | None:
        if ch in _SPACE:
            return ch
        if self.done:
            return None
        if ch == ",":
            self._state = self._next_key if self._stack[-1] == "{" else self._value
            return ch
        return self._pop(ch)


class CallObject:
    """Reads `{"name": "f", "arguments": {…}}`, the first character fed being its "{".

    The arguments may be called "parameters", may be a string that holds the object, may be null, and may come before
    the name. Further members are passed over. known: None, or the only names that make a call; then the object has no
    marker before it that says it is a call, so nothing but the members of a call is accepted, arguments included.
    """

    def __init__(self, known: frozenset[str] | None = None):
        self.name: str | None = None
        self.done = False
        self._known = known
        self._json = JsonObject()
        self._arguments: list[str] | None = None  # pieces not yet taken; None: none have come
        self._read = False  # the arguments are complete

    @property
    def in_string(self) -> bool:
        """As of JsonObject."""
        return self._json.in_string

    @property
    def started(self) -> bool:
        """Both the name and the beginning of the arguments are known."""
        return self.name is not None and self._arguments is not None

    def take(self) -> str:
        """The text of the arguments that has come since the last call of this."""
        text = "".join(self._arguments or ())
        if self._arguments:
            self._arguments = []
        return text

    def feed(self, ch: str) -> bool:
        """False: this is no call."""
        text = self._json.feed(ch)
        if text is None:
            return False
        key, item, closed = self._json.key, self._json.item, self._json.closed
        if closed and not self._member(*closed):
            return False
        if key is not None and not self._accepts(key):
            return False
        if key in _ARGUMENT_KEYS and item and item[0] == "{":
            self._append(text)
        if self._json.done:
            return self._finish()
        return True

    def _append(self, text: str) -> None:
        if self._arguments is None:
            self._arguments = []
        self._arguments.append(text)

    def _accepts(self, key: str) -> bool:
        if key in _ARGUMENT_KEYS and self._read:
            return False
        return self._known is None or key in _CALL_KEYS

    def _member(self, key: str, text: str) -> bool:
        if key in _ARGUMENT_KEYS:
            self._read = True
            return self._whole_arguments(text)
        if key == "name":
            name = json.loads(text)
            self.name = name if isinstance(name, str) and name and name.isprintable() else None
            return self.name is not None and (self._known is None or self.name in self._known)
        return key != "type" or self._known is None or text == '"function"'

    def _whole_arguments(self, text: str) -> bool:
        """An object has been passed on character by character but for its last; others are converted."""
        if text[0] == "{":
            self._append("}")
            return True
        if text == "null":
            self._append("{}")
            return True
        if text[0] != '"':
            return False
        inner: str = json.loads(text)
        try:
            json_text.load_object(inner)
            inner.encode()
        except ValueError:
            return False
        self._append(inner.strip())
        return True

    def _finish(self) -> bool:
        if self._arguments is None and self._known is None:
            self._append("{}")
        self.done = self.started
        return self.done
