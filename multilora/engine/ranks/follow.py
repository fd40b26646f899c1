"""A rank that follows: it does what rank 0 sends, in that order, and samples the same tokens, which never travel.

Every rank executes the same plans over its own part of the model and of the adapters, gathers the same logits and
draws from them by the same (seed, position). It schedules nothing and tells nobody its results. Called by
`process.py`, in a process of its own.
"""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import closing

import torch
import zmq

from multilora.adapters.device.copier import Copy
from multilora.adapters.loading.dora_bias import module_facts
from multilora.config import Config
from multilora.engine.build_rank import build_rank, device_of, make_runner, make_sleep, own_copier, recapture
from multilora.engine.execution.runner import Launched, Runner
from multilora.engine.messages import MemoryTag, Shutdown, UseTokenizer
from multilora.engine.plan import StepPlan
from multilora.engine.ranks.meeting import Groups, meet
from multilora.engine.ranks.messages import (
    Broken,
    CopyPages,
    FromRank,
    Joining,
    ModuleFacts,
    RankProgress,
    RankStart,
    ReleaseMemory,
    RestoreMemory,
    RunStep,
    Up,
    decode_to_rank,
    encode,
    plans_address,
    reports_address,
)
from multilora.engine.ranks.page_relay import PageReceiver
from multilora.errors import MultiloraError

logger = logging.getLogger(__name__)

COPY_CHECK_MS = 1
RECEIVER_CHECK_MS = 500
PAUSE_MS = 20
"""When no plan has come for so long, none is on its way: the last step is read."""


def follow(
    context: "zmq.Context[zmq.Socket[bytes]]",
    directory: str,
    rank: int,
    set_up: Callable[[Config], None] = lambda _config: None,
) -> bool:
    """Serve as rank number `rank` until told to shut down. False: it failed, and rank 0 has been told why.

    set_up: what the process does once it knows the config.
    """
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.bind(plans_address(directory, rank))
    outbox.connect(reports_address(directory))

    def report(message: FromRank) -> None:
        outbox.send(encode(message))

    try:
        start = decode_to_rank(inbox.recv())
        assert isinstance(start, RankStart)
        set_up(start.config)
        device = device_of(start.config, rank)
        report(Joining(rank))
        custom = not start.config.disable_custom_all_reduce
        with closing(meet(start.directory, rank, start.config.tp_size, device, custom_all_reduce=custom)) as groups:
            _Follower(start, device, groups, context, inbox, report).run()
    except MultiloraError as e:
        report(Broken(rank, e.kind, e.message))
        return False
    except Exception as e:
        logger.exception("rank %d failed", rank)
        report(Broken(rank, "EngineDead", f"rank {rank}: {e!r:.300}"))
        return False
    finally:
        inbox.close(linger=0)
        outbox.close(linger=2000)
    return True


class _Peers:
    """The contract of `sleep.Peers` for a rank that tells nobody what to do."""

    def __init__(self, groups: Groups):
        self.agree = groups.not_done

    def release_memory(self, tags: list[MemoryTag], level: int) -> None: ...

    def restore_memory(self, tag: MemoryTag) -> None: ...


class _Follower:
    """The rank, built; `run` ends when it is told to shut down."""

    def __init__(
        self,
        start: RankStart,
        device: torch.device,
        groups: Groups,
        context: "zmq.Context[zmq.Socket[bytes]]",
        inbox: "zmq.Socket[bytes]",
        report: Callable[[FromRank], None],
    ):
        config = start.config
        parts = build_rank(config, groups.model, device)
        self._runner: Runner = make_runner(config, parts)
        self._host_group = groups.host
        self._sleep = make_sleep(config, parts, _Peers(groups))
        self._sleep.use_graphs = recapture(config, parts, self._runner)
        self._base_weight = parts.model.base_weight
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copier = own_copier(config, parts.arena)
        self._copies: deque[Copy] = deque()  # in flight, in the order of their starts
        self._page_bytes = parts.layout.page_bytes
        self._inbox = inbox
        self._ahead = int(device.type == "cuda") if start.ahead is None else start.ahead
        self._in_flight: deque[Launched] = deque()
        self._progress = RankProgress(start.directory, config.tp_size)
        self._rank = start.rank
        self._receiver = PageReceiver(
            context, start.directory, start.rank, self._page_bytes, self._copier, self._progress, device
        )
        report(Up(start.rank))

    def run(self) -> None:
        try:
            self._serve()
        finally:
            self._receiver.close()

    def _serve(self) -> None:
        while True:
            self._note_copies()
            self._receiver.check()
            if not self._inbox.poll(self._patience()):
                if not self._copies:
                    self._read(0)
                continue
            message = decode_to_rank(self._inbox.recv())
            match message:
                case RunStep(plan):
                    self._step(plan)
                case CopyPages(pages):
                    part = self._frame(torch.uint8).view(-1, self._page_bytes)
                    self._copies.append(self._copier.start_copy(part, pages))
                case ModuleFacts():
                    self._tell_facts(message)
                case UseTokenizer(info):
                    self._runner.use_tokenizer(info)
                case ReleaseMemory(tags, level):
                    self._read(0)
                    self._sleep.release(tags, level)
                case RestoreMemory(tag):
                    self._restore(tag)
                case Shutdown():
                    self._receiver.close()  # it gives the copier work
                    self._copier.close()
                    return

    def _patience(self) -> int:
        """How many milliseconds to wait for a message."""
        if self._copies:
            return COPY_CHECK_MS
        return PAUSE_MS if self._in_flight else RECEIVER_CHECK_MS

    def _note_copies(self) -> None:
        """Report those that have finished."""
        while self._copies and self._copies[0].done():
            self._copies.popleft()
            self._progress.copies[self._rank] += 1

    def _frame(self, dtype: torch.dtype) -> torch.Tensor:
        """The next frame of the message, [numbers]."""
        data = self._inbox.recv(copy=False).buffer  # which the tensor keeps
        return torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)

    @torch.inference_mode()
    def _tell_facts(self, asked: ModuleFacts) -> None:
        """Beside the step that runs: the base model's weights never change."""
        a, b = self._frame(torch.float32), self._frame(torch.float32)
        delta = (a.view(asked.rank, -1), b.view(asked.rank, -1)) if asked.rank else None
        with torch.cuda.stream(self._side):  # None: no other stream
            facts = module_facts(self._base_weight, asked.layer, asked.module, delta)
        self._host_group.all_gather(facts)

    def _restore(self, tag: MemoryTag) -> None:
        """Rank 0 hears whether the memory is there, and may ask again. If only the graphs fail, so does the rank."""
        try:
            self._sleep.restore([tag])
        except MultiloraError as e:
            if tag not in self._sleep.released:
                raise
            logger.error("rank %d: %s", self._rank, e.message)

    def _step(self, plan: StepPlan) -> None:
        """As `Engine.step`, without the parts that decide."""
        self._runner.apply(plan)
        forward = self._runner.forward(plan)
        if self._runner.needs_tokens(plan):
            self._read(0)
        self._in_flight.append(self._runner.sample(forward))
        self._read(self._ahead)

    def _read(self, ahead: int) -> None:
        """Read the oldest steps, as grammars need it, until only `ahead` are in flight."""
        while len(self._in_flight) > ahead:
            launched = self._in_flight.popleft()
            launched.result()
            self._progress.steps[self._rank] = launched.plan.number
