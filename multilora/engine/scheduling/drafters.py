"""The ways to draft, by the name that `--speculative-algorithm` gives: adding one is a file and a line here."""

from collections.abc import Callable
from typing import Protocol

from multilora.config import Config
from multilora.engine.scheduling.ngram import ngram_drafters
from multilora.engine.scheduling.request import RequestSpec


class Drafter(Protocol):
    """Guesses how one request goes on. Its tokens are told as they become known, prompt and answer."""

    @property
    def known(self) -> int:
        """How many tokens it has been told."""
        ...

    def extend(self, tokens: list[int]) -> None:
        """The next tokens. Costs a bounded time for each."""
        ...

    def propose(self, count: int) -> list[int]:
        """What may follow, at most `count` tokens. It must cost little, and may be nothing."""
        ...


MakeDrafter = Callable[[RequestSpec], Drafter]

DRAFTERS: dict[str, Callable[[Config], MakeDrafter]] = {"ngram": ngram_drafters}
