"""Namespaces of the prefix cache: which KV pages may serve which requests. KV that could differ never shares one.

    0           the base model, and adapters that leave its keys and values alone
    v + 1       version v, plainly
    -1, -2, …   every other composition, and the page in which an activated adapter begins to act: its KV depends on
                where in the page that is. Given out when first asked for, never again.

A negative number is remembered while a request holds it or the cache has pages under it. The scheduler acquires and
releases; the engine says which versions are gone, and the device tier which have been evicted.
"""

from dataclasses import dataclass

from multilora.memory.prefix_cache import PrefixCache
from multilora.params import Composition

BASE = 0
SWEEP_AT = 64  # remembered numbers

Key = tuple[Composition, int]  # composition, tokens at the page's beginning that it does not act on


@dataclass
class _Number:
    value: int
    holders: int = 0


class Namespaces:
    def __init__(self, prefix: PrefixCache):
        self._prefix = prefix
        self._like_base: set[int] = set()  # versions
        self._numbers: dict[Key, _Number] = {}
        self._of_version: dict[int, set[Key]] = {}
        self._last = BASE
        self._sweep_at = SWEEP_AT

    def acquire(self, composition: Composition, pre_activation: int = 0) -> int:
        """The namespace for pages of a request, until `release`. pre_activation: at the beginning of the page the
        composition does not act on as many tokens."""
        if (plain := self._plain(composition, pre_activation)) is not None:
            return plain
        key = (composition, pre_activation)
        if key not in self._numbers:
            self._add(key)
        self._numbers[key].holders += 1
        return self._numbers[key].value

    def release(self, composition: Composition, pre_activation: int = 0) -> None:
        if self._plain(composition, pre_activation) is None:
            self._numbers[composition, pre_activation].holders -= 1

    def share_with_base(self, version: int) -> None:
        """The version, new, leaves every key and value as the base model has it (`kv_invariance.py`)."""
        self._like_base.add(version)

    def drop(self, version: int, fence: int) -> None:
        """The version is unloaded and no request runs on it: nobody finds the pages that it had a part in any
        more."""
        self._like_base.discard(version)
        self._prefix.drop_namespace(version + 1, fence)
        for key in list(self._of_version.get(version, ())):
            self._prefix.drop_namespace(self._numbers[key].value, fence)
            self._forget(key)

    def demote(self, version: int) -> None:
        """The version was evicted from the device: its idle pages are worth less."""
        self._prefix.demote_namespace(version + 1)
        for key in self._of_version.get(version, ()):
            self._prefix.demote_namespace(self._numbers[key].value)

    def __len__(self) -> int:
        """How many numbers are remembered."""
        return len(self._numbers)

    def _add(self, key: Key) -> None:
        if len(self._numbers) >= self._sweep_at:
            self._sweep()
        self._last -= 1
        self._numbers[key] = _Number(self._last)
        for version, _ in key[0]:
            self._of_version.setdefault(version, set()).add(key)

    def _sweep(self) -> None:
        """Forget numbers that no request holds and no page is kept under. Rare enough to cost nothing on average."""
        for key, number in list(self._numbers.items()):
            if number.holders == 0 and not self._prefix.has_pages(number.value):
                self._forget(key)
        self._sweep_at = max(SWEEP_AT, 2 * len(self._numbers))

    def _forget(self, key: Key) -> None:
        del self._numbers[key]
        for version, _ in key[0]:
            keys = self._of_version[version]
            keys.remove(key)
            if not keys:
                del self._of_version[version]

    def _plain(self, composition: Composition, pre_activation: int) -> int | None:
        if all(version in self._like_base for version, _ in composition):
            return BASE
        [(version, weight), *others] = composition
        return version + 1 if not others and weight == 1.0 and pre_activation == 0 else None
