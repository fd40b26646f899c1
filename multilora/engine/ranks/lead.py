"""Rank 0's handle on the other ranks: it starts them, sends each the same steps, watches them and ends them.

    rank 0, in the engine's process                        rank 1, in a process of its own
    plan ──────────────────── RunStep ─────────────────►   forward ◄── collectives ──► rank 0's forward
    copy of an adapter ────── its bytes ───────────────►   its part, to the same pages
                                                            sample: the same token, which stays there

A thread watches: a rank whose process ends, that reports an error or that does not finish a step in time makes the
whole group fail. The others are killed then, so that the collective in which rank 0 may wait raises, and `check` and
every `send` raise EngineDead. Called by `engine/build.py`.
"""

import contextlib
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Protocol

import torch
import zmq

from multilora.adapters.device.copier import Copier, Copy, DirectCopier
from multilora.adapters.host.staging import Staging
from multilora.adapters.loading.dora_bias import BaseModule, Delta, Facts, facts_of_one, module_facts
from multilora.adapters.pack_table import PackTable
from multilora.config import Config
from multilora.distributed.group import SINGLE, Group
from multilora.engine.messages import MemoryTag, Shutdown, UseTokenizer
from multilora.engine.plan import StepPlan
from multilora.engine.ranks.meeting import Groups, meet
from multilora.engine.ranks.messages import (
    Broken,
    CopyPages,
    Joining,
    ModuleFacts,
    RankProgress,
    RankStart,
    ReleaseMemory,
    RestoreMemory,
    RunStep,
    ToRank,
    Up,
    decode_from_rank,
    encode,
    plans_address,
    reports_address,
)
from multilora.engine.ranks.page_relay import PageRelay
from multilora.errors import EngineDead, MultiloraError, from_wire
from multilora.module_command import module_command
from multilora.private_directory import PrivateDirectory

logger = logging.getLogger(__name__)

CHECK_SECONDS = 0.25  # how often the thread looks
READY_SECONDS = 0.005
END_SECONDS = 3.0  # until a rank that is told to end is killed
NOTICE_SECONDS = 5.0  # until a process that does not notice a failure ends


class RankProcess(Protocol):
    """What runs a rank: a `subprocess.Popen`, or what stands for one."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


StartRank = Callable[[str, int], RankProcess]
"""(directory, rank) → a rank that is starting."""


def start_process(directory: str, rank: int) -> RankProcess:
    """A rank in a process of its own."""
    command = module_command("multilora.engine.ranks.process", directory, str(rank), str(os.getpid()))
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


class NoRanks:
    """The contract of `Ranks` where rank 0 is alone."""

    size = 1

    def run_step(self, plan: StepPlan) -> None: ...

    def use_tokenizer(self, info: str) -> None: ...

    def copying(self, copier: Copier) -> Copier:
        return copier

    def use_staging(self, staging: Staging) -> None: ...

    def facts(self, base: BaseModule) -> Facts:
        return facts_of_one(base)

    def join(self, device: torch.device) -> Group:  # noqa: ARG002 - part of the contract
        return SINGLE

    def wait_until_up(self) -> None: ...

    def failure(self, error: BaseException) -> BaseException:
        return error

    def check(self) -> None: ...

    def release_memory(self, tags: list[MemoryTag], level: int) -> None: ...

    def restore_memory(self, tag: MemoryTag) -> None: ...

    def agree(self, done: bool) -> list[int]:
        return [] if done else [0]

    def close(self) -> None: ...


class Ranks:
    """The ranks from 1 on. All methods belong to one thread.

    exits: this process ends if it has not noticed a failure after some seconds, because rank 0 waits for the device.
    """

    def __init__(self, config: Config, start: StartRank = start_process, ahead: int | None = None, *, exits: bool):
        self._exits = exits
        self.size = config.tp_size
        self._timeout = config.watchdog_timeout
        self._custom_all_reduce = not config.disable_custom_all_reduce
        self._directory = PrivateDirectory("ranks")
        path = str(self._directory.path)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._progress = RankProgress(path, self.size, create=True)
        self._copies = 0  # adapters that were sent
        self._relay = PageRelay(self._context, path, self._progress)
        self._reports = self._context.socket(zmq.PULL)
        self._reports.bind(reports_address(path))
        self._plans: list[zmq.Socket[bytes]] = []
        self._groups = Groups(SINGLE, SINGLE)
        self._sent = 0, 0.0  # number of the last step, and when it was sent
        self._waiting_since: float | None = None  # for what all ranks tell each other between steps
        self._error: MultiloraError | None = None
        self._joining: set[int] = set()
        self._up: set[int] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._noticed = threading.Event()  # rank 0 knows of the failure, or is about to close
        self._processes: list[RankProcess] = []
        for rank in range(1, self.size):
            socket = self._context.socket(zmq.PUSH)
            socket.set(zmq.SNDHWM, 0)  # never wait in `send` for a rank that hangs
            socket.connect(plans_address(path, rank))  # before the rank is there, so that messages wait for it
            self._plans.append(socket)
            socket.send(encode(RankStart(config=config, rank=rank, directory=path, ahead=ahead)))
            self._processes.append(start(path, rank))
        self._watcher = threading.Thread(target=self._watch, name="rank-watchdog", daemon=True)
        self._watcher.start()

    # ------------------------------------------------------------------ what they do

    def join(self, device: torch.device) -> Group:
        """Meet them; rank 0's collectives run on `device`. Raises the error that a rank failed with."""
        self._wait_for(self._joining)
        path, custom = str(self._directory.path), self._custom_all_reduce
        self._groups = meet(path, 0, self.size, device, custom_all_reduce=custom)
        return self._groups.model

    def wait_until_up(self) -> None:
        """Until all are ready for steps and copies. Raises the error that one failed with."""
        self._wait_for(self._up)
        while not self._relay.ready:
            self.check()
            sleep(READY_SECONDS)

    def run_step(self, plan: StepPlan) -> None:
        """Have them execute the plan, which rank 0 does next."""
        self._send(RunStep(plan))
        self._sent = plan.number, monotonic()

    def use_tokenizer(self, info: str) -> None:
        """See `Runner`."""
        self._send(UseTokenizer(info))

    def copying(self, copier: Copier) -> Copier:
        """A copier of packed adapters that sends every rank its part and gives rank 0's to `copier`."""
        return _RankCopier(self, copier)

    def use_staging(self, staging: Staging) -> None:
        """Where copies run beside steps, they copy from this memory themselves what lies there."""
        self._relay.use_staging(staging)

    def facts(self, base: BaseModule) -> Facts:
        """Each rank's facts of its part of the base model; `base`: of rank 0's."""

        def gather(layer: int, module: str, deltas: Sequence[Delta | None]) -> list[torch.Tensor]:
            self.check()
            for socket, delta in zip(self._plans, deltas[1:], strict=True):
                parts = [part.numpy().tobytes() for part in delta] if delta else [b"", b""]
                socket.send_multipart([encode(ModuleFacts(layer, module, len(delta[0]) if delta else 0)), *parts])
            self._waiting_since = monotonic()
            facts = self._groups.host.all_gather(module_facts(base, layer, module, deltas[0]))
            self._waiting_since = None
            return facts

        return gather

    def send_pages(self, pages: list[int], parts: Sequence[torch.Tensor], *, in_order: bool) -> Callable[[], bool]:
        """parts: uint8 [pages, page_bytes] for each rank from 1 on, which are read until they have been sent.

        in_order: they are there before any step that is sent later; else steps go past them. Returns what says
        whether all of these ranks have copied them.
        """
        self.check()
        if in_order:
            header = encode(CopyPages(pages))
            for socket, part in zip(self._plans, parts, strict=True):
                socket.send(header, zmq.SNDMORE)
                socket.send(part.numpy().data, copy=False)
        else:
            self._relay.send(pages, parts)
        self._copies += 1
        number, finished = self._copies, self._progress.copies
        return lambda: bool((finished[1:] >= number).all())

    def release_memory(self, tags: list[MemoryTag], level: int) -> None:
        """Have them release what rank 0 does next (see `DeviceSleep`)."""
        self._send(ReleaseMemory(tags, level))

    def restore_memory(self, tag: MemoryTag) -> None:
        """Have them restore what rank 0 does next."""
        self._send(RestoreMemory(tag))

    def agree(self, done: bool) -> list[int]:
        """Wait for all ranks. Returns those that were not `done`."""
        self._waiting_since = monotonic()
        failed = self._groups.not_done(done)
        self._waiting_since = None
        return failed

    def _send(self, message: ToRank) -> None:
        self.check()
        data = encode(message)
        for socket in self._plans:
            socket.send(data)

    # ------------------------------------------------------------------ how they end

    def check(self) -> None:
        """Raise what a rank failed with."""
        if self._error is not None:
            self._noticed.set()
            raise self._error

    def failure(self, error: BaseException) -> BaseException:
        """What to say of an error of rank 0: a rank's own, if it comes from that."""
        if isinstance(error, MultiloraError):
            return error
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None, timeout=4 * CHECK_SECONDS)
        self._noticed.set()
        return self._error or error

    def close(self) -> None:
        """End all of them."""
        if self._closing:
            return
        self._closing = True
        self._noticed.set()
        self._watcher.join()
        data = encode(Shutdown())
        for socket in self._plans:
            with contextlib.suppress(zmq.Again):
                socket.send(data, zmq.NOBLOCK)
        end = monotonic() + (0.0 if self._error else END_SECONDS)
        for process in self._processes:
            try:
                process.wait(max(0.0, end - monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(END_SECONDS)
        self._groups.close()
        self._relay.close()
        self._context.destroy(linger=0)
        self._directory.close()

    def _wait_for(self, ranks: set[int]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(ranks) == self.size - 1)
        self.check()

    # ------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        while not self._closing:
            if self._reports.poll(int(1000 * CHECK_SECONDS)):
                self._take_reports()
            error = self._error or self._ended() or self._stalled()
            if error is not None:
                self._fail(error)
                return

    def _take_reports(self) -> None:
        with self._changed:
            while self._reports.poll(0):
                match decode_from_rank(self._reports.recv()):
                    case Joining(rank):
                        self._joining.add(rank)
                    case Up(rank):
                        self._up.add(rank)
                    case Broken(_, kind, message):
                        self._error = self._error or from_wire(kind, message)
            self._changed.notify_all()

    def _ended(self) -> MultiloraError | None:
        for rank, process in enumerate(self._processes, 1):
            if (code := process.poll()) is not None:
                if self._reports.poll(200):  # what it said last
                    self._take_reports()
                return self._error or EngineDead(f"rank {rank} of {self.size} ended with code {code}")
        return None

    def _stalled(self) -> MultiloraError | None:
        since = self._waiting_since
        if since is not None and monotonic() - since >= self._timeout:
            return EngineDead(f"a rank has not answered within {self._timeout} s (--watchdog-timeout)")
        number, at = self._sent
        late = [rank for rank in range(1, self.size) if self._progress.steps[rank] < number]
        if not late or monotonic() - at < self._timeout:
            return None
        return EngineDead(
            f"rank {late[0]} of {self.size} has not finished step {number} within {self._timeout} s "
            "(--watchdog-timeout)"
        )

    def _fail(self, error: MultiloraError) -> None:
        logger.error("%s; all ranks end", error.message)
        for process in self._processes:
            process.kill()
        with self._changed:
            self._error = error
            self._changed.notify_all()
        self._groups.close()
        if self._exits and not self._noticed.wait(NOTICE_SECONDS):
            logger.error("rank 0 does not come to an end by itself")
            logging.shutdown()
            os._exit(1)


class _RankCopier:
    """The contract of `Copier`. Where copies run beside steps, one is done when all ranks say so. Where they do not,
    other ranks have an adapter before any step that names it, by the order of their messages."""

    def __init__(self, ranks: Ranks, copier: Copier):
        self._ranks = ranks
        self._copier = copier

    def start_copy(self, buffer: torch.Tensor, pages: list[int], table: PackTable | None = None) -> Copy:
        assert table is None, "ranks get packed pages"
        own, *others = buffer.split(len(pages))
        in_order = isinstance(self._copier, DirectCopier)
        arrived = self._ranks.send_pages(pages, others, in_order=in_order)
        copy = self._copier.start_copy(own, pages)
        return _RankCopy(copy, own, (lambda: True) if in_order else arrived)

    def close(self) -> None:
        self._copier.close()


@dataclass(frozen=True)
class _RankCopy:
    """One copy on all ranks: rank 0's own, of its part, which lives as long, and whether the others' have arrived."""

    copy: Copy
    part: torch.Tensor
    arrived: Callable[[], bool]

    def done(self) -> bool:
        return self.copy.done() and self.arrived()


AnyRanks = Ranks | NoRanks
