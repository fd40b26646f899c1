"""What one task hands to another without waiting: a queue that is emptied at once, cheaper than asyncio's.

While the reader waits, an item may also be taken on the spot (`direct`), which spares waking a task for it.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Any number of writers and one reader, all in one event loop.

    direct: called with an item that is put while the reader waits; True: it has taken the item. Nothing is waiting
    then, so the order is kept.
    """

    direct: Callable[[T], bool] | None = None

    def __init__(self) -> None:
        self._items: list[T] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        """Never waits."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            if self.direct is not None and self.direct(item):
                return
            waiter.set_result(None)
        self._items.append(item)

    async def take(self) -> list[T]:
        """Everything that has come, at least one item. Other tasks run before it returns, even if there is one."""
        if self._items:
            await asyncio.sleep(0)
        else:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items


class LoopTurns:
    """Counts the turns of the event loop in which somebody asked for the number."""

    def __init__(self) -> None:
        self._number = 0
        self._asked = False

    @property
    def now(self) -> int:
        """The number of this turn."""
        if not self._asked:
            self._asked = True
            asyncio.get_running_loop().call_soon(self._next)
        return self._number

    def _next(self) -> None:
        self._number += 1
        self._asked = False
