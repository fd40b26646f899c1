"""Speculative decoding: which requests have drafts verified in a step, and how long these are.

A draft is worth it if the tokens that it is expected to bring, by how often drafts of the same adapters were right,
are more than the batch would make in the time that it costs, by the steps that have run. What is not worth it, or not
known yet, is tried now and then, for a small part of the time. Owns the drafters, and what was learnt of adapters and
steps; knows no pages and no plans.

A drafted token is verified by sampling at its position, as would have been done without it: what a request gets does
not depend on drafts. Requests of which the sampler keeps more than a seed (penalties count tokens, grammars follow
them) have none. Called by `scheduler.py` and `commits.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from multilora.engine.plan import StepPlan
from multilora.engine.scheduling.acceptance import Acceptance, AcceptanceTable
from multilora.engine.scheduling.drafters import Drafter, MakeDrafter
from multilora.engine.scheduling.request import Request
from multilora.engine.scheduling.verify_cost import VerifyCost

MARGIN = 1.25  # a draft must bring so many times what it costs
LEAST_PRICE = 0.03  # of a drafted token, in tokens: what was measured may be 0 by chance
READ_AHEAD = 4096  # tokens of prompts that drafters read in one plan, about a millisecond
TRIALS_SHARE = 0.01  # of the time goes into trials
FIRST_ALLOWANCE, MOST_ALLOWANCE = 0.1, 0.25  # seconds for trials: at the start, and saved up
PLAIN_AFTER = 64  # steps with drafts in a row, then one without: what those cost is measured


@dataclass
class _Found:
    request: Request
    draft: list[int]
    trial: bool
    acceptance: Acceptance


class Speculation:
    """most: tokens of one draft. price: of a drafted token, in tokens that the batch makes meanwhile."""

    def __init__(self, make_drafter: MakeDrafter, most: int):
        self._make_drafter = make_drafter
        self._most = most
        self._drafters: dict[Request, Drafter] = {}
        self._acceptances = AcceptanceTable()
        self._cost = VerifyCost()
        self._held: set[Request] = set()  # it takes no step until its last token is known
        self._in_a_row = 0  # plans with drafts
        self._allowance = FIRST_ALLOWANCE  # seconds that trials may still cost
        self._tries = False  # this plan may have a trial
        self._trials: dict[int, float] = {}  # number of a step → the part of its drafted tokens that are trials
        self._unread = READ_AHEAD  # tokens that drafters may still read in this plan

    # ------------------------------------------------------------------ a plan

    def ready(self, running: Sequence[Request], *, overlaps: bool) -> list[Request]:
        """The running requests that may take a step. Where steps overlap, the others are those whose draft is being
        verified, and those that have a draft as soon as the host knows their last token."""
        self._unread = READ_AHEAD
        if not overlaps:
            return list(running)
        self._tries = self._allowance >= 0
        self._held = {r for r in running if r.progress.in_flight == 1 and self._foresees(r, len(running))}
        return [r for r in running if not r.progress.drafted and r not in self._held]

    def drafts(self, rows: Sequence[Request], room: int, *, number: int, overlaps: bool) -> dict[Request, list[int]]:
        """The drafts to verify in step `number`. rows: the requests that decode in it; room: drafted tokens that it
        can take."""
        if not self._cost.known or self._in_a_row >= PLAIN_AFTER:
            self._in_a_row = 0
            return {}
        self._tries = self._allowance >= 0
        found = []
        for request in rows:
            one = self._find(request, len(rows), room)
            if one is not None:
                found.append(one)
                room -= len(one.draft)
        chosen = self._choose(found, len(rows), lost=_lost(overlaps, len(rows)))
        self._in_a_row = self._in_a_row + 1 if chosen else 0
        if tried := [one for one in chosen if one.trial]:
            drafted = sum(len(one.draft) for one in chosen)
            self._trials[number] = sum(len(one.draft) for one in tried) / drafted
        return {one.request: one.draft for one in chosen}

    def _find(self, request: Request, rows: int, room: int) -> _Found | None:
        progress, spec = request.progress, request.spec
        if progress.in_flight or not spec.can_draft:
            return None
        held = request in self._held
        self._held.discard(request)
        acceptance = self._acceptances.of(spec.adapters)
        wanted, trial = self._wanted(acceptance, rows)
        count = min(wanted, room, spec.max_new_tokens - len(progress.output_ids) - 1)
        draft = self._propose(request, count) if count > 0 else []
        self._tries &= not (trial and draft)  # one is enough
        if not draft:
            if held and count > 0:  # it waited for a token that was another one
                acceptance.observe(1, 0)
                self._allowance -= self._cost.plain if trial else 0.0
            return None
        return _Found(request, draft, trial, acceptance)

    def _wanted(self, acceptance: Acceptance, rows: int) -> tuple[int, bool]:
        """How long a draft should be, and whether it is a trial."""
        if not self._cost.measured:
            return (min(2**self._cost.observed, self._most), True) if self._tries else (0, False)
        wanted = best_length(acceptance.rate, self._most, self._price(rows))
        if wanted:
            return wanted, False
        acceptance.refuse()
        return (self._most, True) if acceptance.due and self._tries else (0, False)

    def _choose(self, found: list[_Found], rows: int, lost: int) -> list[_Found]:
        """All that are no trials or none of them, and the trials."""
        sure = [one for one in found if not one.trial]
        gain = sum(expected(one.acceptance.rate, len(one.draft)) - lost for one in sure)
        worth = gain > MARGIN * self._cost_of(sum(len(one.draft) for one in sure), rows)
        chosen = []
        for one in found:
            if not one.trial and not worth:
                one.acceptance.refuse()
                one.trial = one.acceptance.due and self._tries
                self._tries &= not one.trial
            if one.trial:
                one.acceptance.begin_trial()
                chosen.append(one)
            elif worth:
                one.acceptance.resume()
                chosen.append(one)
        return chosen

    def _foresees(self, request: Request, rows: int) -> bool:
        """Whether a request should wait for its last token, which only the device knows, to have a draft verified:
        there is one that begins with a guess at that token."""
        if request.progress.drafted or not request.progress.decoding or not request.spec.can_draft:
            return False
        if request.at_limit or not self._cost.known:
            return False
        acceptance = self._acceptances.of(request.spec.adapters)
        wanted, trial = self._wanted(acceptance, rows)
        if not trial and wanted:
            gain = expected(acceptance.rate, wanted) - _lost(True, rows)
            if gain <= MARGIN * self._cost_of(wanted, rows):
                acceptance.refuse()
                wanted = self._most if acceptance.due and self._tries else 0
        return wanted > 0 and bool(self._propose(request, wanted))

    def _propose(self, request: Request, count: int) -> list[int]:
        """Nothing as long as the drafter has not read all known tokens."""
        drafter = self._drafters.get(request)
        if drafter is None:
            drafter = self._drafters[request] = self._make_drafter(request.spec)
        missing = request.progress.num_tokens - drafter.known
        reads = min(missing, self._unread)
        if reads:
            self._unread -= reads
            drafter.extend(request.token_ids(drafter.known, reads))
        return drafter.propose(count) if reads == missing else []

    def _price(self, rows: int) -> float:
        return max(LEAST_PRICE, self._cost.per_token * rows / self._cost.plain)

    def _cost_of(self, drafted: int, rows: int) -> float:
        """What that many drafted tokens cost, in tokens that the batch makes meanwhile."""
        return self._cost.fixed * rows / self._cost.plain + self._price(rows) * drafted if drafted else 0.0

    # ------------------------------------------------------------------ what came of it

    def observe_step(self, plan: StepPlan, seconds: float) -> None:
        """A step was committed so long after the one before."""
        tried = self._trials.pop(plan.number, 0.0)
        if plan.prompt_tokens:
            return
        self._allowance = min(self._allowance + TRIALS_SHARE * seconds, MOST_ALLOWANCE)
        if tried:
            self._allowance -= tried * max(0.0, seconds - self._cost.plain)
        self._cost.observe(plan.drafted_tokens, seconds)

    def observe(self, request: Request, drafted: int, accepted: int) -> None:
        """A draft was verified: its first `accepted` tokens are what was sampled."""
        self._acceptances.of(request.spec.adapters).observe(drafted, accepted)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._drafters.pop(request, None)
        self._held.discard(request)


def best_length(rate: float, most: int, price: float) -> int:
    """The longest draft whose last token is still worth its price: with the probability `rate` for each token, that
    one is right as often as all up to it are."""
    length, chance = 0, rate
    while length < most and chance > MARGIN * price:
        length, chance = length + 1, chance * rate
    return length


def expected(rate: float, length: int) -> float:
    """How many tokens of a draft are right on average, of which each is with the probability `rate`, if all before it
    are."""
    return float(length) if rate >= 1 else rate * (1 - rate**length) / (1 - rate)


def _lost(overlaps: bool, rows: int) -> int:
    """Tokens that a request does not get in the step that runs while its draft is on its way to the host."""
    return int(overlaps and rows > 1)
