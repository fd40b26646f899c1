"""One replica's engine in simulated time: continuous batching, chunked prefill, adapters on two tiers.

The waiting requests are ordered, charged for and forgotten by one of the package's own scheduling policies. What the
package's admission and adapter store decide is simplified: a request starts when a slot is free and its adapter is on
the device; the first few that wait have theirs fetched and copied; idle adapters are evicted, the least recently used
first. KV pages are never short. Runs of plain decode steps are one event.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from bench.cluster_sim.calibration import RANK_BYTES, Calibration
from bench.cluster_sim.trace import Arrival, rank_of
from multilora.engine.scheduling.policy import POLICIES
from multilora.engine.scheduling.request import Request, RequestSpec
from multilora.params import SamplingParams

PARAMS = SamplingParams()
FETCHES = 4  # adapters that are read from files at a time
PROMPTS = [[0] * n for n in range(4097)]  # only lengths count


@dataclass(frozen=True)
class Sizes:
    """slots: requests that run at a time; chunk: prompt tokens of a step; device_bytes, host_bytes: for adapters.
    storage_rate: bytes a second that a replica gets of adapters' files at most; 0: they are on a disk of its own, as
    they were when loads were measured."""

    slots: int = 64
    chunk: int = 2048
    device_bytes: float = 32e9
    host_bytes: float = 64e9
    policy: str = "fair"
    storage_rate: float = 0.0


@dataclass(eq=False, slots=True)
class Job:
    """One request at one replica. sent: when its client sent it; hit: "device", "host" or "" for neither."""

    arrival: Arrival
    sent: float
    request: Request
    replica: str
    hit: str = ""
    left: int = 0  # prompt tokens
    first: float | None = None  # time of the first token
    ends: int = 0  # the engine's count of decode steps when it ends
    owner: object = None


class Tier:
    """Adapters by age of their last use, with their bytes."""

    def __init__(self, most: float):
        self.most = most
        self.used = 0.0
        self.items: OrderedDict[int, float] = OrderedDict()

    def __contains__(self, adapter: int) -> bool:
        return adapter in self.items

    def touch(self, adapter: int) -> None:
        self.items.move_to_end(adapter)

    def drop(self, adapter: int) -> None:
        self.used -= self.items.pop(adapter)

    def make_room(self, nbytes: float, keep: Callable[[int], bool]) -> list[int] | None:
        """Who has to go for that, already dropped; None: those that are kept leave no room."""
        gone, free = [], self.most - self.used
        for adapter, size in self.items.items():
            if free >= nbytes:
                break
            if not keep(adapter):
                gone.append(adapter)
                free += size
        if free < nbytes:
            return None
        for adapter in gone:
            self.drop(adapter)
        return gone

    def add(self, adapter: int, nbytes: float) -> None:
        self.items[adapter] = nbytes
        self.used += nbytes


def bytes_of(adapter: int) -> float:
    return rank_of(adapter) * RANK_BYTES


class SimulatedEngine:
    """ideal: every adapter is on the device at any time. at: schedules a call. first, ended: are told of jobs.
    pace: how many times as long a step takes that begins now, where engines share a machine's cores; None: they do
    not."""

    def __init__(
        self,
        name: str,
        sizes: Sizes,
        calibration: Calibration,
        at: Callable[[float, Callable[[float], None]], None],
        first: Callable[[Job, float], None],
        ended: Callable[[Job, float], None],
        ideal: bool = False,
        pace: Callable[[], float] | None = None,
    ):
        self.name = name
        self._pace = pace
        self._sizes, self._calibration, self._at = sizes, calibration, at
        self._first, self._ended, self._ideal = first, ended, ideal
        self._policy = POLICIES[sizes.policy](lambda _request: 0)
        self._jobs: dict[Request, Job] = {}
        self._waiting: list[Request] = []
        self._prefilling: list[Job] = []
        self._decoding: list[tuple[int, int, Job]] = []  # a heap, by the step that each ends with
        self._users: dict[int, int] = {}  # of adapters, by running requests
        self._ranks = 0  # their sum
        self.device, self.host = Tier(sizes.device_bytes), Tier(sizes.host_bytes)
        self._loading: set[int] = set()
        self._fetching = 0
        self._link_free = self._storage_free = 0.0
        self._steps = 0
        self._run: tuple[float, float, int, int] | None = None  # begin, seconds of a step, steps, number of the run
        self._runs = 0
        self._prompts: list[tuple[Job, int]] = []  # of the present step
        self._order = 0
        self.dead = False
        self.load = 0  # requests that are not ended
        self.fetched = 0.0  # bytes that were read from files
        self.unread = 0  # prompt tokens of requests without a first token

    @property
    def busy(self) -> bool:
        """Whether it computes a step."""
        return self._run is not None

    @property
    def jobs(self) -> list[Job]:
        return list(self._jobs.values())

    def submit(self, arrival: Arrival, sent: float, now: float, owner: object) -> Job:
        """A request arrives."""
        self._order += 1
        spec = RequestSpec(
            rid="", prompt_ids=PROMPTS[arrival.prompt], params=PARAMS, adapters=((arrival.adapter, 1.0),),
            activation=0, seed=0, order=self._order, arrival=now, vocab_size=1, top_logprobs=-1, return_ranks=False,
            logprobs_mode="raw", prompt_logprobs_from=None, prompt_top=0, prompt_ranks=False, pooling=None, salt="",
            grammar=None, tenant="", priority=0, deadline=None,
        )  # fmt: skip
        job = Job(arrival, sent, Request.of(spec), self.name, left=arrival.prompt, owner=owner)
        self._jobs[job.request] = job
        self.load += 1
        self.unread += arrival.prompt
        self._waiting.append(job.request)
        self._policy.enqueue(job.request)
        on_device = self._ideal or arrival.adapter in self.device
        job.hit = "device" if on_device else "host" if arrival.adapter in self.host else ""
        self.wake(now)
        return job

    def wake(self, now: float) -> None:
        """Something has changed: an idle engine begins a step, a run of decode steps ends with the present one."""
        if self.dead:
            return
        if self._run is None:
            self._begin(now)
            return
        begin, seconds, steps, run = self._run
        done = min(steps, int((now - begin) / seconds) + 1)
        if done < steps:
            self._run = begin, seconds, done, run
            self._at(begin + done * seconds, lambda time: self._end(run, time))

    def remember(self, adapter: int) -> None:
        """A request for the adapter was served some time ago. It is on both tiers; what was used least recently has
        gone for it."""
        for tier in (self.host, self.device):
            if adapter in tier:
                tier.touch(adapter)
            elif tier.make_room(bytes_of(adapter), lambda _: False) is not None:
                tier.add(adapter, bytes_of(adapter))

    # ------------------------------------------------------------------ steps

    def _begin(self, now: float) -> None:
        self._admit(now)
        budget, prompts = self._sizes.chunk, list[tuple[Job, int]]()
        for request in self._policy.prefills([job.request for job in self._prefilling]):
            job = self._jobs[request]
            taken = min(budget, job.left)
            if taken:
                prompts.append((job, taken))
                budget -= taken
        decodes = len(self._decoding)
        if not prompts and not decodes:
            return
        tokens = self._sizes.chunk - budget
        seconds = self._calibration.step(decodes, tokens, len(self._users), self._ranks)
        steps = 1 if prompts else max(1, self._decoding[0][0] - self._steps)
        if self._pace is not None:
            seconds, steps = seconds * self._pace(), 1
        self._runs += 1
        run = self._runs
        self._run = now, seconds, steps, run
        self._prompts = prompts
        self._at(now + steps * seconds, lambda time: self._end(run, time))

    def _end(self, run: int, now: float) -> None:
        if self.dead or self._run is None or self._run[3] != run:
            return
        begin, seconds, steps, _ = self._run
        if now + 1e-12 < begin + steps * seconds:
            return
        if now > begin + steps * seconds + 1e-9:
            return  # it was cut short: that end has come already
        self._run = None
        for _, _, job in self._decoding:
            job.request.progress.num_scheduled += steps
            self._policy.charge(job.request, steps)
        self._steps += steps
        while self._decoding and self._decoding[0][0] <= self._steps:
            self._finish(heapq.heappop(self._decoding)[2], now)
        for job, taken in self._prompts:
            job.left -= taken
            job.request.progress.num_scheduled += taken
            self._policy.charge(job.request, taken)
            if not job.left:
                self._prefilling.remove(job)
                self._take_first(job, now)
        self._begin(now)

    def _take_first(self, job: Job, now: float) -> None:
        if job.first is None:
            job.first = now
            self.unread -= job.arrival.prompt
            self._first(job, now)
        job.ends = self._steps + job.arrival.answer - 1
        if job.arrival.answer <= 1:
            self._finish(job, now)
        else:
            heapq.heappush(self._decoding, (job.ends, job.request.spec.order, job))

    def _finish(self, job: Job, now: float) -> None:
        self._policy.forget(job.request)
        del self._jobs[job.request]
        self.load -= 1
        adapter = job.arrival.adapter
        self._users[adapter] -= 1
        if not self._users[adapter]:
            del self._users[adapter]
            self._ranks -= rank_of(adapter)
        self._ended(job, now)

    # ------------------------------------------------------------------ who starts, and adapters

    def _admit(self, now: float) -> None:
        running = len(self._prefilling) + len(self._decoding)
        if not self._waiting:
            return
        window = self._policy.window(self._waiting, now, starting=running < self._sizes.slots)
        started = list[Request]()
        for request in islice(self._policy.order(window), 2 * self._sizes.slots):
            adapter = request.spec.adapters[0][0]
            if self._ideal or adapter in self.device:
                if running + len(started) >= self._sizes.slots:
                    break
                started.append(request)
                self._ranks += rank_of(adapter) * (adapter not in self._users)
                self._users[adapter] = self._users.get(adapter, 0) + 1
                if not self._ideal:
                    self.device.touch(adapter)
            elif adapter not in self._loading:
                self._load(adapter, now)
        for request in started:
            self._policy.dequeue(request)
            self._waiting.remove(request)
            self._prefilling.append(self._jobs[request])

    def _load(self, adapter: int, now: float) -> None:
        if adapter in self.host:
            self.host.touch(adapter)
            self._copy(adapter, now)
        elif self._fetching < FETCHES:
            self._fetching += 1
            self._loading.add(adapter)
            self.fetched += bytes_of(adapter)
            times, nbytes = self._calibration, bytes_of(adapter)
            fixed = times.fetch_fixed + times.fetch_busy * bool(self._users)
            rate = min(times.memory_rate, self._sizes.storage_rate or times.memory_rate)
            self._storage_free = max(now, self._storage_free) + nbytes / rate
            ready = fixed + max(now + nbytes / times.fetch_rate, self._storage_free)
            self._at(ready, lambda time: self._fetched(adapter, time))

    def _fetched(self, adapter: int, now: float) -> None:
        if self.dead:
            return
        self._fetching -= 1
        self._loading.discard(adapter)
        if self.host.make_room(bytes_of(adapter), lambda _: False) is not None:
            self.host.add(adapter, bytes_of(adapter))
        self._copy(adapter, now)
        self.wake(now)

    def _copy(self, adapter: int, now: float) -> None:
        if self.device.make_room(bytes_of(adapter), lambda one: one in self._users) is None:
            return  # all that is there is in use: it is tried again when something ends
        self.device.used += bytes_of(adapter)
        self._loading.add(adapter)
        self._link_free = max(now, self._link_free) + bytes_of(adapter) / self._calibration.copy_rate
        self._at(self._link_free, lambda time: self._copied(adapter, time))

    def _copied(self, adapter: int, now: float) -> None:
        if self.dead:
            return
        self._loading.discard(adapter)
        self.device.items[adapter] = bytes_of(adapter)
        self.wake(now)
