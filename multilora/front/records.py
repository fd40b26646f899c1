"""What the registry writes down, so that another server can go on where this one has ended, however it ended.

`Records` keeps nothing; `StateDirectory` (`state_directory.py`) is what --state-dir asks for. Their methods may
block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from multilora.front.adapter_ref import AdapterRef
from multilora.front.adapter_spec import AdapterSpec

OLD_MARK_LENGTHS = 64, 32
"""How long marks of earlier ways were: a SHA-256 of times and inodes, a digest over longer parts of the files."""


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """An adapter that a client has been told is loaded, or a composition, which has `parts`.

    path: as the client gave it; local: the directory that the engine reads; fingerprint: of the files there.
    """

    name: str
    version: int
    path: str
    local: str = ""
    pinned: bool = False
    weight_version: str | None = None
    parts: AdapterSpec = ()
    fingerprint: str = ""

    def is_of_other_files(self, fingerprint: str) -> bool:
        """Whether this is not the fingerprint of the files that were recorded. Marks that were made another way
        cannot tell."""
        return self.fingerprint != fingerprint and not self.has_old_mark

    @property
    def has_old_mark(self) -> bool:
        """Whether the fingerprint was made in a way that is not today's."""
        return len(self.fingerprint) in OLD_MARK_LENGTHS

    @classmethod
    def of(cls, ref: AdapterRef, local: str = "", fingerprint: str = "") -> "AdapterRecord":
        """What is to be known of a version."""
        return cls(
            name=ref.name,
            version=ref.version,
            path=ref.path,
            local=local,
            pinned=ref.pinned,
            weight_version=ref.weight_version,
            parts=ref.parts,
            fingerprint=fingerprint,
        )


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """next_version: no smaller one is free; weight_version: the server's label, None: the default; unloaded: name →
    path of adapters of --lora-paths that clients have unloaded."""

    adapters: Sequence[AdapterRecord] = ()
    next_version: int = 1
    weight_version: str | None = None
    unloaded: Mapping[str, str] = field(default_factory=dict)


class Records:
    """Keeps nothing. `durable`: whether it does; `names`: of the adapters in it; `startup`: name → path of the
    adapters that are loaded at every start anyway (--lora-paths), unless they are unloaded."""

    durable = False

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.startup: dict[str, str] = {}

    def read(self) -> SavedState:
        """What there is. Raises StorageFailed."""
        return SavedState()

    def save(self, record: AdapterRecord) -> None:
        """From now on the name is this version, unless it is a later one already. Raises StorageFailed; nothing has
        changed then."""

    def mark(self, name: str, version: int, fingerprint: str) -> None:
        """The version, if the name is still that one, has this fingerprint. Raises StorageFailed; nothing has changed
        then."""

    def remove(self, name: str) -> None:
        """From now on the name is nothing. Raises StorageFailed; nothing has changed then."""

    def label_weights(self, weight_version: str) -> None:
        """The server's own label. Raises StorageFailed; nothing has changed then."""

    def close(self) -> None:
        """Nothing more is written."""
