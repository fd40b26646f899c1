"""Both ends over a real pipe; the clock is the test's."""

import os
import threading
from collections.abc import Iterator

import pytest

from multilora.engine.process.pulse import LATE_SECONDS, PULSE_SECONDS, Pulse, PulseMonitor


class Ends:
    def __init__(self, heartbeat: float = 4, step: float = 300):
        reading, self.writing = os.pipe()
        self.now = 0.0
        self.monitor = PulseMonitor(reading, heartbeat, step, lambda: self.now)
        self.pulse = Pulse(self.writing)

    def wait(self, seconds: float, *, rounds: int = 0, silent: bool = False) -> str | None:
        """Checks every PULSE_SECONDS; the first thing found wrong."""
        end = self.now + seconds
        while self.now < end:
            self.now += PULSE_SECONDS
            if not silent:
                self.pulse.rounds += rounds
                self.pulse._send()
            if (wrong := self.monitor.check()) is not None:
                return wrong
        return None


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    made.monitor.check()
    yield made
    made.monitor.close()
    os.close(made.writing)


def test_a_sound_engine_is_left_alone(ends: Ends) -> None:
    assert ends.wait(1000, rounds=1) is None


def test_silence_is_noticed_within_five_seconds(ends: Ends) -> None:
    assert ends.wait(10, rounds=1) is None
    began = ends.now
    assert "no sign of life for 4 s" in (ends.wait(10, silent=True) or "")
    assert ends.now - began <= 5


def test_a_step_that_hangs_while_the_thread_lives_is_noticed(ends: Ends) -> None:
    ends.wait(10, rounds=1)
    assert ends.wait(299) is None
    assert "a step has not ended within 300 s" in (ends.wait(10) or "")


def test_the_clock_starts_with_the_first_check() -> None:
    ends = Ends()
    ends.now += 1000
    assert ends.monitor.check() is None


def test_a_front_that_was_stopped_itself_blames_nobody(ends: Ends) -> None:
    ends.wait(10, rounds=1)
    ends.now += 3600
    assert ends.monitor.check() is None
    assert ends.wait(LATE_SECONDS, silent=True) is None
    assert ends.wait(10, silent=True) is not None


def test_without_a_heartbeat_only_steps_count() -> None:
    ends = Ends(heartbeat=0, step=60)
    ends.monitor.check()
    assert ends.wait(59, silent=True) is None
    assert "a step" in (ends.wait(10, silent=True) or "")


def test_a_pipe_full_of_pulses_or_without_a_reader_disturbs_nobody(ends: Ends) -> None:
    for _ in range(20_000):
        ends.pulse._send()
    assert ends.monitor.check() is None


def test_the_thread_sends_and_calls() -> None:
    reading, writing = os.pipe()
    called = threading.Event()
    pulse = Pulse(writing, called.set)
    pulse.start()
    assert called.wait(10)
    pulse.stop()
    pulse._thread.join(10)
    assert not pulse._thread.is_alive()
    assert len(os.read(reading, 1 << 16)) >= 16
    os.close(reading)
    os.close(writing)
