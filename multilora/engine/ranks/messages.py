"""What rank 0 and the other ranks say to each other: msgspec structs, sent as msgpack over ZeroMQ, no pickle.

    rank 0 → rank r    RankStart, then in the order in which rank 0 does the same: CopyPages (its bytes are the frame
                       that follows), ModuleFacts (two frames), RunStep, UseTokenizer, ReleaseMemory,
                       RestoreMemory; Shutdown at the end
    rank r → rank 0    Joining, Up; Broken if it fails

A rank reports its steps and copies through `RankProgress`, memory that all of them map, which costs a step nothing.
Where copies run beside steps, `page_relay.py` takes the place of CopyPages.
"""

import mmap
from pathlib import Path

import msgspec
import numpy as np

from multilora.config import Config
from multilora.engine.messages import MemoryTag, Shutdown, UseTokenizer
from multilora.engine.plan import StepPlan


class RankStart(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The first message. directory: holds the sockets, the file in which the ranks meet, and their progress."""

    config: Config
    rank: int
    directory: str
    ahead: int | None  # see `Engine`


class RunStep(msgspec.Struct, tag=True, frozen=True):
    """Execute the plan, as rank 0 does now."""

    plan: StepPlan


class CopyPages(msgspec.Struct, tag=True, frozen=True):
    """The next frame is this rank's part of an adapter, one page after the other: copy it to these arena pages."""

    pages: list[int]


class ModuleFacts(msgspec.Struct, tag=True, frozen=True):
    """Compute `dora_bias.module_facts` and gather them. The next two frames are this rank's A and B, fp32, of `rank`
    rows each; empty if there is no low rank."""

    layer: int
    module: str
    rank: int


class ReleaseMemory(msgspec.Struct, tag=True, frozen=True):
    """Finish the steps in flight and release the device memory that the tags name, as `Sleep` at this level."""

    tags: list[MemoryTag]
    level: int


class RestoreMemory(msgspec.Struct, tag=True, frozen=True):
    """Take the memory of this tag again, as `WakeUp`."""

    memory: MemoryTag


class Joining(msgspec.Struct, tag=True, frozen=True):
    """The rank has started and is about to meet the others."""

    rank: int


class Up(msgspec.Struct, tag=True, frozen=True):
    """The rank is ready for steps."""

    rank: int


class Broken(msgspec.Struct, tag=True, frozen=True):
    """The rank has failed and ends. kind, message: as in `multilora.errors`."""

    rank: int
    kind: str
    message: str


ToRank = RankStart | RunStep | CopyPages | ModuleFacts | UseTokenizer | ReleaseMemory | RestoreMemory | Shutdown
FromRank = Joining | Up | Broken

_encoder = msgspec.msgpack.Encoder()
_to_rank = msgspec.msgpack.Decoder(ToRank)
_from_rank = msgspec.msgpack.Decoder(FromRank)


def encode(message: ToRank | FromRank) -> bytes:
    return _encoder.encode(message)


def decode_to_rank(data: bytes) -> ToRank:
    message: ToRank = _to_rank.decode(data)
    return message


def decode_from_rank(data: bytes) -> FromRank:
    message: FromRank = _from_rank.decode(data)
    return message


def plans_address(directory: str, rank: int) -> str:
    """Where the rank hears rank 0."""
    return f"ipc://{directory}/rank{rank}"


def reports_address(directory: str) -> str:
    """Where rank 0 hears all others."""
    return f"ipc://{directory}/reports"


def pages_address(directory: str, rank: int) -> str:
    """Where the rank hears of adapters' pages in shared memory."""
    return f"ipc://{directory}/pages{rank}"


class RankProgress:
    """What each rank has finished, int64 [size], in shared memory. steps: the number of its last step; copies: how
    many adapters it has copied to its pages by now; pieces: how many `PagePiece` of them; mapped: how many
    `MapMemory` it has seen to."""

    def __init__(self, directory: str, size: int, *, create: bool = False):
        path = Path(directory, "progress")
        if create:
            path.write_bytes(bytes(4 * 8 * size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 4 * 8 * size)
        found = np.frombuffer(self._memory, np.int64).reshape(4, size)
        self.steps, self.copies, self.pieces, self.mapped = found
