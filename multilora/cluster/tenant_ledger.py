"""What a cluster's tenants have been served, by all replicas: each tells its own part and hears the others'.

So a tenant's counter of the policy `fair` is the same on a replica that has served it nothing as on one that has
served it all, but for the second between two exchanges. Lives in the registry's process; what it holds need not
outlast that.
"""

from collections.abc import Mapping

MAX_TENANTS = 100_000
"""From so many on, those of which nobody is to hear any more are forgotten."""


class TenantLedger:
    """Weighted tokens by tenant. Not thread-safe."""

    def __init__(self) -> None:
        self._total: dict[str, float] = {}
        self._told: dict[str, dict[str, float]] = {}  # replica → of the totals, what it knows

    def exchange(self, replica: str, served: Mapping[str, float]) -> dict[str, float]:
        """A replica has served tenants so much since it last asked. Returns what the others have; nothing of the time
        before it first asked."""
        told = self._told.get(replica)
        if told is None:
            told = self._told[replica] = dict(self._total)
        others = {name: total - told.get(name, 0.0) for name, total in self._total.items()}
        for name, service in served.items():
            self._total[name] = self._total.get(name, 0.0) + service
        self._told[replica] = dict(self._total)
        if len(self._total) > MAX_TENANTS:
            self._forget()
        return {name: service for name, service in others.items() if service > 0}

    def keep(self, replicas: set[str]) -> None:
        """There are only these any more."""
        for gone in self._told.keys() - replicas:
            del self._told[gone]

    def _forget(self) -> None:
        every = list(self._told.values())
        known = [name for name, total in self._total.items() if all(told.get(name) == total for told in every)]
        for name in known:
            del self._total[name]
            for told in every:
                told.pop(name, None)
