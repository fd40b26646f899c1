"""Tells every worker what a change of adapters has done to the names, and knows when all of them go by it."""

import asyncio
from collections.abc import Callable, Iterator
from time import monotonic

from multilora.drivers.workers.desk import Desk
from multilora.front.adapter_ref import AdapterRef
from multilora.front.registry import AdapterRegistry
from multilora.front.workers.messages import NameRow, NamesChanged, ToWorker

CHECK_SECONDS = 0.002
"""Between two looks whether the workers have applied a change; one takes 1 ms or less, but for a tokenizer."""


class NamesFeed:
    """Tells workers the changes of one registry, whose `on_change` it is."""

    def __init__(self, registry: AdapterRegistry):
        self._registry = registry
        self._seq = 0
        self._desks: dict[Desk, Callable[[ToWorker], None]] = {}
        registry.on_change = self._changed

    def snapshot(self) -> NamesChanged:
        """All names, as they are now."""
        return self._message(self._registry.versions())

    def add(self, desk: Desk, send: Callable[[ToWorker], None]) -> None:
        """One more worker, which is given the snapshot of this moment first."""
        self._desks[desk] = send
        desk.seq = desk.applied = self._seq

    def remove(self, desk: Desk) -> None:
        """A worker is gone."""
        self._desks.pop(desk, None)

    async def settled(self, seconds: float) -> list[Desk]:
        """Wait until each worker's requests see what has changed by now, for so long at most. Returns those of whom
        this is not known then."""
        wanted, deadline = self._seq, monotonic() + seconds
        while (late := list(self._behind(wanted))) and monotonic() < deadline:
            await asyncio.sleep(CHECK_SECONDS)
        return late

    def _behind(self, seq: int) -> Iterator[Desk]:
        return (desk for desk in self._desks if desk.joined and desk.applied < seq)

    def _changed(self, ref: AdapterRef | None) -> None:
        self._seq += 1
        message = self._message([] if ref is None else [ref])
        for desk, send in self._desks.items():
            desk.seq = self._seq
            send(message)

    def _message(self, refs: list[AdapterRef]) -> NamesChanged:
        rows = [NameRow.of(ref) for ref in refs]
        return NamesChanged(seq=self._seq, rows=rows, weight_version=self._registry.weight_version)
