"""How much each key, and all requests for one adapter, may take: token buckets and concurrency, without I/O.

A bucket holds one minute's worth at most and fills steadily. A request is admitted while every bucket that it draws
from has something left; its tokens are taken as they are read and generated, so that a bucket may go below nothing,
by what was running then. Owns the accounts. Knows nothing of HTTP; `Front` asks for each request.
"""

import fnmatch
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from multilora.errors import BadRequest, RateLimited
from multilora.front.access import Caller, Limits, shown

MAX_ACCOUNTS = 4096
"""From so many on, those that are as good as new are forgotten."""
_MINUTE = 60.0


class TokenBucket:
    """`used`: how much is missing, which comes back within a minute if it is not more than one minute's worth."""

    def __init__(self) -> None:
        self._used = 0.0
        self._at = 0.0  # when that was so

    def wait(self, per_minute: int, need: float, now: float) -> float:
        """Seconds until it holds `need`; 0: it does."""
        missing = self._refilled(per_minute, now) + need - per_minute
        return max(0.0, missing * _MINUTE / per_minute)

    def take(self, amount: float, per_minute: int, now: float) -> None:
        """Take it out, whether or not it is there."""
        self._used = self._refilled(per_minute, now) + amount
        self._at = now

    def is_full(self, per_minute: int | None, now: float) -> bool:
        """Whether nothing is missing."""
        return per_minute is None or self._refilled(per_minute, now) <= 0

    def _refilled(self, per_minute: int, now: float) -> float:
        return max(0.0, self._used - (now - self._at) * per_minute / _MINUTE)


class Account:
    """What one key or adapter has taken."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.requests = TokenBucket()
        self.tokens = TokenBucket()
        self.running = 0  # samples

    def is_new(self, now: float) -> bool:
        """Whether it is as if it had never been used."""
        full = self.requests.is_full(self.limits.requests_per_minute, now)
        return not self.running and full and self.tokens.is_full(self.limits.tokens_per_minute, now)


@dataclass(frozen=True)
class Grant:
    """What one admitted sample draws from, until it is released."""

    accounts: tuple[Account, ...] = ()
    clock: Callable[[], float] = time.monotonic

    def charge(self, tokens: int) -> None:
        """The sample has read or generated `tokens` more."""
        for account in self.accounts:
            if account.limits.tokens_per_minute is not None:
                account.tokens.take(tokens, account.limits.tokens_per_minute, self.clock())

    def release(self) -> None:
        """The sample has ended."""
        for account in self.accounts:
            account.running -= 1


UNLIMITED = Grant()


class Quotas:
    """The quotas of one server. adapters: an adapter has the limits of the first pattern that matches its name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.adapters: Sequence[tuple[str, Limits]] = ()
        self._clock = clock
        self._accounts: dict[tuple[str, str], Account] = {}  # ("key" or "adapter", name)

    def take_request(self, caller: Caller) -> None:
        """The key has sent one more request, of whatever kind. Raises RateLimited."""
        name = ("key", caller.key_id)
        if caller.limits.requests_per_minute is not None:
            account = self._account(name, caller.limits)
            self._check_requests(name, account)
            self._take_request(account)

    def admit(self, caller: Caller, samples: Sequence[Collection[str]]) -> list[Grant]:
        """One grant for each sample of a request, given the full names of its adapters. Raises RateLimited, and takes
        nothing then; BadRequest for more samples than may ever run at once."""
        found = [self._of_sample(caller, names) for names in samples]
        counts = Counter(name for accounts in found for name in accounts)
        accounts = {name: account for each in found for name, account in each.items()}
        for name, account in accounts.items():
            self._check(name, account, counts[name])
        for name, account in accounts.items():
            if name[0] == "adapter":  # a key's was taken when its request came in
                self._take_request(account)
            account.running += counts[name]
        return [Grant(tuple(each.values()), self._clock) if each else UNLIMITED for each in found]

    def _of_sample(self, caller: Caller, names: Collection[str]) -> dict[tuple[str, str], Account]:
        limited = {("key", caller.key_id): caller.limits} | {("adapter", name): self._limits(name) for name in names}
        return {name: self._account(name, limits) for name, limits in limited.items() if limits != Limits()}

    def _limits(self, adapter: str) -> Limits:
        matches = (limits for pattern, limits in self.adapters if fnmatch.fnmatchcase(adapter, pattern))
        return next(matches, Limits())

    def _account(self, name: tuple[str, str], limits: Limits) -> Account:
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= MAX_ACCOUNTS:
                now = self._clock()
                self._accounts = {key: a for key, a in self._accounts.items() if not a.is_new(now)}
            account = self._accounts[name] = Account(limits)
        account.limits = limits
        return account

    def _check(self, name: tuple[str, str], account: Account, count: int) -> None:
        limits, now = account.limits, self._clock()
        if limits.concurrency is not None and count > limits.concurrency:
            raise BadRequest(f"{count} sequences in one request; {_show(name)} may have {limits.concurrency} at once")
        if limits.concurrency is not None and account.running + count > limits.concurrency:
            raise RateLimited(f"{_show(name)} has {account.running} sequences running, {limits.concurrency} at most")
        if limits.tokens_per_minute is not None:
            wait = account.tokens.wait(limits.tokens_per_minute, 1.0, now)
            _refuse(wait, f"{_show(name)} has used up its {limits.tokens_per_minute} tokens a minute")
        if name[0] == "adapter":
            self._check_requests(name, account)

    def _check_requests(self, name: tuple[str, str], account: Account) -> None:
        per_minute = account.limits.requests_per_minute
        if per_minute is not None:
            wait = account.requests.wait(per_minute, 1.0, self._clock())
            _refuse(wait, f"{_show(name)} has used up its {per_minute} requests a minute")

    def _take_request(self, account: Account) -> None:
        if account.limits.requests_per_minute is not None:
            account.requests.take(1.0, account.limits.requests_per_minute, self._clock())


def _refuse(wait: float, message: str) -> None:
    if wait > 0:
        raise RateLimited(f"{message}; try again later", retry_after=math.ceil(wait))


def _show(name: tuple[str, str]) -> str:
    kind, text = name
    return f"{kind} {(text if kind == 'key' else shown(text))!r}"
