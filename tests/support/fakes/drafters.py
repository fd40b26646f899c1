"""A drafter that knows the answers, for tests: of what it drafts much is right, and some goes wrong somewhere."""

import random
from collections.abc import Sequence


class Foreseer:
    """Drafts how one of `sequences`, prompts with their answers, goes on that begins with the tokens so far; where
    none does, those tokens again from the start."""

    def __init__(self, sequences: Sequence[Sequence[int]], rng: random.Random):
        self._sequences = sequences
        self._rng = rng
        self._tokens: list[int] = []

    @property
    def known(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: list[int]) -> None:
        self._tokens += tokens
        self._sequences = [s for s in self._sequences if list(s[: self.known]) == self._tokens]

    def propose(self, count: int) -> list[int]:
        count = self._rng.randrange(count + 1)
        source = self._sequences[0][self.known :] if self._sequences else self._tokens
        draft = list(source[:count])
        if draft and self._rng.random() < 0.4:
            i = self._rng.randrange(len(draft))
            draft[i] = abs(draft[i] - 1)
        return draft
