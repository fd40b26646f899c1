"""The adapters of a cluster as one of its processes knows them: name → record, and changes of that.

The registry (`shared_registry.py`) is the only writer; every replica and every ingress has a copy, which it changes
as it is told. A record's version is the cluster's: it rises with every change of a name, and is never used twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from multilora.front.records import AdapterRecord


@dataclass(frozen=True, kw_only=True)
class TableChange:
    """What has happened up to the change of number `seq`. whole: `records` are all there are; else they replace those
    of their names, and `gone` are no longer there. weight_version: the cluster's label, None: the default."""

    seq: int
    whole: bool = False
    records: Sequence[AdapterRecord] = ()
    gone: Sequence[str] = ()
    weight_version: str | None = None


class ClusterTable:
    """seq: the number of the latest change that is in it."""

    def __init__(self) -> None:
        self.seq = 0
        self.records: dict[str, AdapterRecord] = {}
        self.weight_version: str | None = None

    def apply(self, change: TableChange) -> None:
        """Take it in."""
        if change.whole:
            self.records.clear()
        for name in change.gone:
            self.records.pop(name, None)
        for record in change.records:
            self.records[record.name] = record
        self.weight_version = change.weight_version
        self.seq = change.seq

    def version_of(self, name: str) -> int:
        """The version that requests for the name get; 0: there is none."""
        record = self.records.get(name)
        return 0 if record is None else record.version

    def everything(self) -> TableChange:
        """All of it, for somebody who has nothing."""
        records = list(self.records.values())
        return TableChange(seq=self.seq, whole=True, records=records, weight_version=self.weight_version)
