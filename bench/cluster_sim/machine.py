"""What steps of real replicas take that share this machine's cores, and what is in a first token beside them.

Measured on one replica at a time, and on all of them while each only decodes. Requests reach the replica that is
meant by their session. Used by `validate`, for the simulated half.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import httpx
import numpy as np

from bench.cluster_client import GENERATED, Cluster, Timed, client_of, generate
from bench.cluster_sim.calibration import Calibration, calibrate

BATCHES = (1, 3, 6)  # requests at a time, while steps are measured: fewer than `slack`, so that no session leaves
ROUNDS = 2
TOKENS = 24
SHORT = 16  # tokens of a prompt
PROBES = 12
METRIC_SECONDS = 0.5  # until a replica's metrics know of a request


@dataclass(frozen=True)
class Machine:
    """calibration: of one replica while no other computes. shared: how many times as long a step takes while one, two
    … replicas compute. beside: seconds of first tokens that are not the engine's, one for each probe, while no other
    replica computes and while all others do."""

    calibration: Calibration
    shared: Sequence[float]
    beside: tuple[Sequence[float], Sequence[float]]

    def step(self, batch: int, busy: int) -> float:
        """Seconds of a step with so many requests while so many replicas compute."""
        return self.calibration.step(batch, 0, batch, 0) * self.shared[busy - 1]

    def mean_with(self, other: "Machine") -> "Machine":
        """As another time is half of it."""
        mine, its = self.calibration, other.calibration
        calibration = replace(
            mine,
            decode=tuple(mean(pair) for pair in zip(mine.decode, its.decode, strict=True)),  # type: ignore[arg-type]
            per_prompt_token=mean((mine.per_prompt_token, its.per_prompt_token)),
        )
        shared = [mean(pair) for pair in zip(self.shared, other.shared, strict=True)]
        alone, crowded = ([*a, *b] for a, b in zip(self.beside, other.beside, strict=True))
        return Machine(calibration, shared, (alone, crowded))

    def row(self) -> dict[str, Any]:
        """For a result's file, in milliseconds."""
        fixed, row, *_ = self.calibration.decode
        return {
            "step_ms": {"fixed": round(fixed * 1e3, 2), "each_request": round(row * 1e3, 3)},
            "prompt_token_ms": round(self.calibration.per_prompt_token * 1e3, 4),
            "shared_cores": [round(one, 2) for one in self.shared],
            "beside_median_ms": [round(median(some) * 1e3, 1) for some in self.beside],
        }


def prompt_of(number: int, length: int) -> list[int]:
    """Tokens of no other prompt."""
    rng = random.Random(number)
    return [rng.randrange(2, 250) for _ in range(length)]


class _Asker:
    """Requests with prompts that nobody has read, on adapters in turn."""

    def __init__(self, client: httpx.AsyncClient, adapters: int):
        self._client, self._adapters = client, adapters
        self._number = 10_000

    async def ask(self, session: str, adapter: int, prompt: int, tokens: int) -> Timed:
        self._number += 1
        content, name = prompt_of(self._number, prompt), f"adapter-{adapter % self._adapters}"
        return await generate(self._client, content, name, tokens, stream=True, session=session)

    async def batch(self, sessions: Sequence[str], count: int, tokens: int) -> list[Timed]:
        """So many at a time in each session."""
        asked = (self.ask(one, i, SHORT, tokens) for one in sessions for i in range(count))
        return list(await asyncio.gather(*asked))


async def measure(cluster: Cluster, replicas: int, adapters: int, longest: int) -> Machine:
    """A minute or more. longest: tokens of the longest prompt that matters."""
    async with client_of(cluster) as client:
        asker = _Asker(client, adapters)
        sessions = await _sessions(cluster, asker, replicas)
        await asker.batch(sessions, max(BATCHES), 8)
        alone, shared = await _steps(asker, sessions)
        row, fixed = np.polyfit(BATCHES, [mean(alone[batch]) for batch in BATCHES], 1)
        decode = (float(max(fixed, 0)), float(max(row, 0)), 0.0, 0.0)
        first = {n: [await _first_token(asker, sessions[0], n) for _ in range(PROBES)] for n in (SHORT, longest)}
        per_token = max(0.0, (median(first[longest]) - median(first[SHORT])) / (longest - SHORT))
        known = replace(calibrate(), decode=decode, per_prompt_token=per_token)
        crowded = await _while_others_decode(asker, sessions)
    taken = known.step(0, SHORT, 1, 0)
    beside = [max(0.0, one - taken) for one in first[SHORT]], [max(0.0, one - taken * shared[-1]) for one in crowded]
    return Machine(known, shared, beside)


async def _sessions(cluster: Cluster, asker: _Asker, replicas: int) -> Sequence[str]:
    """One for each replica. Raises TimeoutError."""
    found: dict[str, str] = {}
    before = await asyncio.to_thread(cluster.samples, GENERATED)
    for number in range(20 * replicas):
        session = f"session-{number}"
        await asker.ask(session, number, SHORT, 4)
        await asyncio.sleep(METRIC_SECONDS)
        after = await asyncio.to_thread(cluster.samples, GENERATED)
        grown = [name for name, count in after.items() if count > before.get(name, 0.0)]
        if len(grown) == 1:
            found.setdefault(grown[0], session)
        before = after
        if len(found) == replicas:
            return list(found.values())
    raise TimeoutError(f"of {replicas} replicas only {sorted(found)} get requests")


async def _steps(asker: _Asker, sessions: Sequence[str]) -> tuple[dict[int, list[float]], Sequence[float]]:
    """Seconds of steps on the first replica by batch, and how many times as long they are with more of them. In
    rounds, so that what others do on the machine meanwhile falls on all alike."""
    taken: dict[tuple[int, int], list[float]] = {}
    for _ in range(ROUNDS):
        for busy in range(1, len(sessions) + 1):
            for batch in BATCHES:
                streams = await asker.batch(sessions[:busy], batch, TOKENS)
                taken.setdefault((busy, batch), []).append(
                    mean((one.ended - one.first) / (one.tokens - 1) for one in streams)
                )
    alone = {batch: taken[1, batch] for batch in BATCHES}
    shared = [
        mean(mean(taken[busy, batch]) / mean(alone[batch]) for batch in BATCHES)
        for busy in range(1, len(sessions) + 1)
    ]
    return alone, [max(1.0, one) for one in shared]


async def _first_token(asker: _Asker, session: str, prompt: int) -> float:
    one = await asker.ask(session, 0, prompt, 2)
    return one.first - one.sent


async def _while_others_decode(asker: _Asker, sessions: Sequence[str]) -> list[float]:
    """First tokens of the first replica, which is idle else, while the others decode."""
    idle, *others = sessions
    over = asyncio.Event()

    async def keep_busy(session: str) -> None:
        while not over.is_set():
            await asker.batch([session], 4, TOKENS)

    busy = [asyncio.ensure_future(keep_busy(session)) for session in others]
    found = [await _first_token(asker, idle, SHORT) for _ in range(PROBES)]
    over.set()
    await asyncio.gather(*busy)
    return found
