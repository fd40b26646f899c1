"""How often drafted tokens were right, by adapters, and when those that are not worth drafting for are tried again.

Owns numbers only. What a draft is worth: `speculation.py`, which calls.
"""

from collections import OrderedDict

from multilora.params import Composition

FORGET = 0.97  # weight that older drafts keep with every new one
FIRST_RATE, FIRST_WEIGHT = 0.6, 2.0  # what is assumed before there was any draft, and the tokens that it counts
FIRST_TRIAL, LAST_TRIAL = 16, 512  # steps without a draft before the next trial; twice as many after each
MOST_KEPT = 1024  # compositions with numbers of their own


class Acceptance:
    """How the drafts of one composition did.

    rate: the part of the drafted tokens that were right, of those behind which all before them were. `refuse` counts
    a chance to draft that was not taken; `due`: so many that a draft should be tried again, whatever the rate.
    """

    def __init__(self) -> None:
        self._right, self._all = FIRST_RATE * FIRST_WEIGHT, FIRST_WEIGHT
        self._next = self._pause = FIRST_TRIAL

    @property
    def rate(self) -> float:
        return self._right / self._all

    @property
    def due(self) -> bool:
        return self._next <= 0

    def observe(self, drafted: int, accepted: int) -> None:
        """A draft of so many tokens was verified: the first `accepted` were right, the next one, if any, was not."""
        self._right = FORGET * self._right + accepted
        self._all = FORGET * self._all + accepted + (accepted < drafted)

    def refuse(self) -> None:
        self._next -= 1

    def begin_trial(self) -> None:
        """A draft is tried; the next trial waits longer."""
        self._next = self._pause = min(2 * self._pause, LAST_TRIAL)

    def resume(self) -> None:
        """Drafting is worth it."""
        self._next = self._pause = FIRST_TRIAL


class AcceptanceTable:
    """By composition; the least recently used goes first."""

    def __init__(self) -> None:
        self._records: OrderedDict[Composition, Acceptance] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def of(self, adapters: Composition) -> Acceptance:
        record = self._records.get(adapters)
        if record is None:
            record = self._records[adapters] = Acceptance()
            if len(self._records) > MOST_KEPT:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(adapters)
        return record
