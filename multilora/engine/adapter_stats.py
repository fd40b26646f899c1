"""The statistics of adapters, of which the engine says only what has changed, as a whole again. Used by the front's
handle on an engine, `process/client.py`.
"""

import msgspec

from multilora.engine.messages import AdapterStats, Stats


class AdapterStatsTable:
    """The adapters of an engine, as its `Stats` messages so far add up to."""

    def __init__(self) -> None:
        self._adapters: dict[int, AdapterStats] = {}

    def merge(self, update: Stats) -> Stats:
        """Take an update in. Returns it with all adapters instead of the changed ones."""
        self._adapters.update((adapter.version, adapter) for adapter in update.adapters)
        for version in update.unloaded:
            self._adapters.pop(version, None)
        return msgspec.structs.replace(update, adapters=list(self._adapters.values()), unloaded=[])
