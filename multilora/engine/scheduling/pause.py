"""Whether the scheduler plans steps, and whether new requests are taken in. Written by `engine/pause_control.py`."""

from multilora.engine.messages import PauseMode
from multilora.errors import EngineAsleep, EnginePaused


class SchedulingPause:
    """mode: None while the engine generates; queues: whether a pause lets requests come and wait."""

    def __init__(self) -> None:
        self.mode: PauseMode | None = None
        self.queues = True
        self.sleeping = False

    @property
    def frozen(self) -> bool:
        """No step is planned. A pause that waits for its requests lets them run; nothing comes after them."""
        return self.mode not in (None, "wait")

    def check_open(self) -> None:
        """Raise EnginePaused or EngineAsleep if no request is taken in."""
        if self.mode is None or self.queues:
            return
        if self.sleeping:
            raise EngineAsleep("the engine is asleep; wake it up (POST /wake_up) and try again")
        raise EnginePaused("generation is paused; resume it (POST /resume) or try again later")
