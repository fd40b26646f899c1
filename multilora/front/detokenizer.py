"""Token ids to text, a few at a time.

The emitted pieces join to `tokenizer.decode` of all ids: text is held back while it ends in U+FFFD, since that may be
the beginning of a character. (One exception, where decode destroys text: a run of byte-fallback tokens that ends
broken keeps the valid characters it began with.)

The method is the prefix offset: a token's text depends on the token before it (leading spaces, joined bytes), so the
pending tokens are decoded behind the last emitted ones, and the text of those alone is cut off.
"""

from collections.abc import Iterable, Sequence

from multilora.front.tokenizer import Tokenizer, remember

_BROKEN = "\ufffd"
_MAX_PENDING = 16  # tokens; a character in the making has at most 3


class Detokenizer:
    """Turns one answer's token ids into text as they arrive; one object per answer.

    kept: special tokens whose text is emitted even when `skip_special_tokens` drops the others.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        kept: Iterable[str] = (),
    ):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids - tokenizer.special_ids_of(kept) if skip_special_tokens else frozenset()
        self._spaces = spaces_between_special_tokens
        self._steps = tokenizer.steps[spaces_between_special_tokens]
        self._alone = tokenizer.context_free
        self._last: int | None = -1  # the token that is all of the prefix, -1 at the beginning, None: no such token
        self._prefix: list[int] = []  # the last tokens whose text is emitted entirely
        self._prefix_text: str | None = ""  # the text of `_prefix` decoded alone; None: not known yet
        self._pending: list[int] = []  # tokens after them
        self._sent = 0  # characters of the pending tokens' text that are emitted

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete, possibly empty."""
        if len(token_ids) == 1:
            return "" if token_ids[0] in self._skip else self._step(token_ids[0])
        return "".join([self._step(token) for token in token_ids if token not in self._skip])

    def _step(self, token: int) -> str:
        """`_push_one`, remembered for tokens that are whole characters, of which the next text is a function."""
        last = self._last
        if last is None or self._pending:
            return self._push_one(token)
        key = token if self._alone else (last, token)
        known = self._steps.get(key)
        if known is None:
            new = self._push_one(token)
            if self._last == token:
                remember(self._steps, key, new)
            return new
        self._last = token
        self._prefix = [token]
        self._prefix_text = None
        return known

    def finish(self) -> str:
        """Return the text that is still held back, since no further token will come."""
        if not self._pending:
            return ""
        rest = self._pending_text()[self._sent :]
        self._advance(len(self._pending), sent=0)
        return rest

    def _push_one(self, token: int) -> str:
        self._pending.append(token)
        text = self._pending_text()
        stable = len(text.rstrip(_BROKEN))
        new = text[self._sent : stable]
        if text and stable == len(text):
            whole = len(self._pending) == 1
            self._advance(len(self._pending), sent=0)
            self._last = token if whole else None
            return new
        self._sent = max(self._sent, stable)
        if len(self._pending) >= _MAX_PENDING:
            new += self._shorten(text)
        return new

    def _pending_text(self) -> str:
        if self._prefix_text is None:
            self._prefix_text = self._decode(self._prefix)
        text = self._decode(self._prefix + self._pending)
        if text.startswith(self._prefix_text):
            return text[len(self._prefix_text) :]
        return self._decode(self._pending)  # a byte run that was valid so far has broken

    def _shorten(self, text: str) -> str:
        """Emit the part of a long broken `text` that can no longer change, and keep few tokens pending.

        The cut lies where decoding both sides apart gives the same text as together: no character spans such a place.
        """
        if not text:  # ids that the tokenizer does not know
            del self._pending[_MAX_PENDING // 2 :]
            return ""
        whole = self._decode(self._pending)
        for cut in range(len(self._pending) - 1, 0, -1):
            after = self._decode(self._pending[cut:])
            if self._decode(self._pending[:cut]) + after == whole:
                end = len(text) - len(after)
                new = text[self._sent : end]
                self._advance(cut, sent=max(0, self._sent - end))
                return new
        return ""

    def _advance(self, count: int, *, sent: int) -> None:
        """Move the first `count` pending tokens to the prefix; `sent` characters of the others are emitted."""
        self._prefix, self._pending = self._pending[:count], self._pending[count:]
        self._prefix_text = None
        self._last = None
        self._sent = sent

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=self._spaces)
