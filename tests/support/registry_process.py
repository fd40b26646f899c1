"""A front's adapters over a state directory without an engine, and a program that SIGKILL ends in the middle.

    python -m registry_process DIRECTORY POINT…

forks a process for each POINT: it makes the `changes` in DIRECTORY/POINT, notes each that is acknowledged in
DIRECTORY/POINT.acks, and kills itself at that write point, counted from 0.
"""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from multilora.adapters.sources.spool import Spool, WritePoint
from multilora.config import Config
from multilora.engine.messages import AdapterInfo, Ready, Stats
from multilora.errors import AdapterNotFound, MultiloraError
from multilora.front.effects import (
    CarryThrough,
    EngineLoad,
    EngineUnload,
    Gather,
    RunBlocking,
    Spawn,
    WaitUntilIdle,
    Within,
)
from multilora.front.front import Front
from multilora.front.state_directory import StateDirectory
from multilora.params import EmbeddingSettings

WEIGHTS = "adapter_model.safetensors"
_STATS = Stats(
    **{f.name: 0 for f in msgspec.structs.fields(Stats) if f.required and f.name != "adapters"}, adapters=[]
)


class NoEngine:
    """What is loaded: version → directory. It reads the weights' file as the adapter's fingerprint."""

    alive, restarting, restarts, stats = True, False, 0, _STATS
    ready = Ready(
        context_length=64,
        vocab_size=32,
        eos_token_ids=[1],
        num_layers=1,
        dtype="float32",
        device="cpu",
        lora_backend="torch",
        attention_backend="torch",
        embedding=EmbeddingSettings(size=64),
        stats=_STATS,
    )

    def __init__(self) -> None:
        self.loaded: dict[int, tuple[str, bool]] = {}

    def load(self, version: int, path: str, pinned: bool) -> AdapterInfo:
        if not os.path.isdir(path):
            raise AdapterNotFound(f"no such directory: {path}")
        mark = Path(path, WEIGHTS).read_text()
        assert version not in self.loaded
        self.loaded[version] = (mark, pinned)
        return AdapterInfo(version=version, path=path, rank=1, target_modules=[], nbytes=1, pages=1, fingerprint=mark)


class RegistryProcess:
    """A front over the state directory; `run` performs its work at once."""

    def __init__(self, state: Path, reached: Callable[[WritePoint], None] = lambda _point: None, **options: Any):
        self.engine = NoEngine()
        self.records = StateDirectory(state, reached)
        self.spool = Spool(self.records.adapters, reached)
        config = Config.make(served_model_name="base", enable_lora=True, **options)
        self.front = Front(config, self.engine, None, self.spool, records=self.records)  # type: ignore[arg-type]
        self.registry = self.front.registry
        self.run(self.front.load_at_start())

    def run(self, steps: Any) -> Any:
        value: Any = None
        error: BaseException | None = None
        while True:
            try:
                effect = steps.send(value) if error is None else steps.throw(error)
            except StopIteration as stop:
                return stop.value
            value, error = None, None
            try:
                value = self._perform(effect)
            except MultiloraError as e:
                error = e

    def _perform(self, effect: Any) -> Any:
        match effect:
            case RunBlocking(function=function):
                return function()
            case Within(steps) | CarryThrough(steps):
                return self.run(steps)
            case EngineLoad(version, path, pinned):
                return self.engine.load(version, path, pinned)
            case EngineUnload(version):
                del self.engine.loaded[version]
            case Spawn(steps):
                self.run(steps)
            case Gather(children, _):
                return [self._outcome(child) for child in children]
            case WaitUntilIdle():
                pass
            case other:
                raise AssertionError(other)
        return None

    def _outcome(self, steps: Any) -> Any:
        try:
            return self.run(steps)
        except MultiloraError as e:
            return e

    def state(self) -> dict[str, Any]:
        """What requests get, by name, and the server's label."""
        found: dict[str, Any] = {"": self.registry.weight_version}
        for ref in self.registry.refs():
            weights = [[name, weight] for name, weight in ref.parts] or list(self.engine.loaded[ref.version])
            found[ref.name] = [weights, ref.weight_version, ref.version]
        return found

    def close(self) -> None:
        self.spool.close()
        self.records.close()


def tensors(text: str) -> Callable[[Path], None]:
    return lambda path: Path(path).write_text(text) and None


def adapter(root: Path, text: str) -> str:
    """A directory with an adapter whose weights are the text."""
    folder = root / text
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_text(text)
    return str(folder)


def changes(p: RegistryProcess, root: Path) -> list[Any]:
    """Every kind of change, in an order in which each is possible."""
    manager = p.front.adapters
    return [
        manager.load("a", str(root / "a1")),
        manager.load_tensors("t", {}, tensors("t1")),
        manager.load("b", str(root / "b1"), pinned=True, weight_version="step-1"),
        manager.compose("c", [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 2.0}]),
        manager.load("a", str(root / "a2"), replace=True),
        manager.load_tensors("t", {}, tensors("t2"), replace=True, pinned=True),
        manager.compose("c", [{"name": "b", "weight": 1.5}, {"name": "t", "weight": 1.0}], replace=True),
        manager.unload("c"),
        manager.unload("t"),
        manager.load_tensors("t", {}, tensors("t3")),
        manager.label_weights("step-2"),
        manager.unload("b"),
        manager.load("b", str(root / "b2")),
        manager.unload("startup"),
    ]


def play(root: Path, number: int) -> None:
    """Make the changes, note each that is acknowledged, and end at write point `number`."""
    points = itertools.count()

    def reached(_point: WritePoint) -> None:
        if next(points) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    p = RegistryProcess(root / str(number), reached, lora_paths={"startup": str(root / "s")})
    acks = os.open(root / f"{number}.acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for change in [None, *changes(p, root)]:
        if change is not None:
            p.run(change)
        os.write(acks, json.dumps(p.state()).encode() + b"\n")
    os.write(acks, json.dumps(next(points)).encode() + b"\n")


def main() -> None:
    root = Path(sys.argv[1])
    for number in map(int, sys.argv[2:]):
        pid = os.fork()
        if pid == 0:
            play(root, number)
            os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
