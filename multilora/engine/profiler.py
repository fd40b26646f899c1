"""Records what the engine's process does with torch's profiler: one profile at a time, between steps.

Owned by `engine.py`, which says when a step is about to run. A profile of a number of steps ends by itself, before
the step after them; the trace is written then, and the step waits for that.
"""

import logging
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from multilora.engine.messages import StartProfile
from multilora.errors import BadRequest, MultiloraError

logger = logging.getLogger(__name__)


class Profiler:
    """At most one profile is wanted, and at most that one is recorded."""

    def __init__(self) -> None:
        self._wanted: StartProfile | None = None
        self._last: int | None = None  # number of the last step to record; None: until `stop`
        self._recording: torch.profiler.profile | None = None

    def start(self, wanted: StartProfile, launched: int) -> None:
        """Begin with step `wanted.start_step`, at once if it has been launched already or is not given.

        Raises BadRequest if a profile is running, or nothing that it asks for can be recorded here.
        """
        if self._wanted is not None:
            raise BadRequest("a profile is running already; stop it first")
        if not _activities(wanted):
            raise BadRequest(f"activities: {wanted.activities}: this engine computes on the CPU", param="activities")
        first = max(wanted.start_step or 0, launched + 1)
        self._wanted = wanted
        self._last = None if wanted.num_steps is None else first + wanted.num_steps - 1
        if first == launched + 1:
            self._begin(wanted)

    def before_step(self, number: int) -> None:
        """Step `number` is about to run: begin or end what is due."""
        wanted = self._wanted
        if wanted is None:
            return
        if self._last is not None and number > self._last:
            try:
                self._end(wanted)
            except MultiloraError as e:  # nobody waits for this profile; the step must run
                logger.error("%s", e)
        elif self._recording is None and number >= (wanted.start_step or 0):
            self._begin(wanted)

    def stop(self) -> None:
        """Write the trace. Raises BadRequest if no profile is running, MultiloraError if it cannot be written."""
        if self._wanted is None:
            raise BadRequest("no profile is running")
        self._end(self._wanted)

    def _begin(self, wanted: StartProfile) -> None:
        self._recording = torch.profiler.profile(
            activities=_activities(wanted), with_stack=wanted.with_stack, record_shapes=wanted.record_shapes
        )
        self._recording.start()
        logger.info("profile begins: %s", wanted.path)

    def _end(self, wanted: StartProfile) -> None:
        recording, self._wanted, self._recording = self._recording, None, None
        if recording is None:
            raise BadRequest(f"the profile ends before step {wanted.start_step}, with which it was to begin")
        begun = time.monotonic()
        recording.stop()
        try:
            Path(wanted.path).parent.mkdir(parents=True, exist_ok=True)
            recording.export_chrome_trace(wanted.path)
        except (OSError, RuntimeError) as e:
            raise MultiloraError(f"the profile cannot be written to {wanted.path}: {e}") from e
        logger.info("profile written to %s in %.1f s", wanted.path, time.monotonic() - begun)


def _activities(wanted: StartProfile) -> list[ProfilerActivity]:
    found = []
    if "CPU" in wanted.activities:
        found.append(ProfilerActivity.CPU)
    if "GPU" in wanted.activities and torch.cuda.is_available():
        found.append(ProfilerActivity.CUDA)
    return found
