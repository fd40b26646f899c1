"""What a cluster is made of: a YAML file or a mapping, checked once, then frozen and passed down.

`serve` are the flags of `multilora serve`, with underscores, and are checked as there. What belongs to one server's
HTTP or to its own records is the cluster's here, and refused there.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multilora.config import Config
from multilora.errors import ConfigError

CLUSTERS_OWN = ("host", "port", "state_dir", "front_workers", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
"""Options of `serve` that say nothing about a replica."""
NAME = "multilora"


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """engine: of each replica. state_dir: a directory that all processes of the cluster see, and that outlasts them.

    min_replicas = max_replicas: no autoscaling. cpus: of a replica. target_requests: that a replica has, on average;
    target_pressure: part of the places for adapters that requests use, on average. factor, slack, copies:
    see `RouterSettings`. retries: further replicas that a request is sent to, as long as nothing of its answer was.
    """

    state_dir: str
    engine: Config = field(default_factory=Config)
    min_replicas: int = 1
    max_replicas: int = 1
    ingresses: int = 1
    cpus: float = 1.0
    host: str = "127.0.0.1"
    port: int = 8000
    target_requests: float = 32.0
    target_pressure: float = 0.8
    factor: float = 1.25
    slack: float = 8.0
    copies: int = 2
    retries: int = 2
    report_seconds: float = 1.0

    @property
    def gpus(self) -> int:
        """How many GPUs one replica has, all of one host."""
        return 0 if self.engine.device == "cpu" else self.engine.tp_size

    @property
    def autoscales(self) -> bool:
        return self.min_replicas < self.max_replicas

    @classmethod
    def read(cls, path: str | Path) -> "ClusterConfig":
        """The file's. Raises ConfigError."""
        import yaml  # type: ignore[import-untyped]

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as e:
            raise ConfigError(f"--config {str(path)!r} cannot be read: {e}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"--config {str(path)!r}: expected a mapping")
        return cls.make(content)

    @classmethod
    def make(cls, content: Mapping[str, Any]) -> "ClusterConfig":
        """From what the file says. `replicas` is a number, or a mapping of `min` and `max`. Raises ConfigError."""
        values = dict(content)
        serve = values.pop("serve", None) or {}
        if not isinstance(serve, Mapping):
            raise ConfigError("serve: expected a mapping of the flags of `multilora serve`")
        for name in CLUSTERS_OWN:
            if name in serve:
                raise ConfigError(f"serve.{name}: this is the cluster's affair, not a replica's")
        values |= _replicas(values.pop("replicas", 1))
        known = {f.name for f in dataclasses.fields(cls)} - {"engine"}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), [*known, "serve", "replicas"], n=1)
                raise ConfigError(f"{name}: unknown" + (f"; did you mean {near[0]}?" if near else ""))
        if "state_dir" not in values:
            raise ConfigError("state_dir: a directory that all processes of the cluster see is needed")
        engine = Config.make(**serve)
        if engine.has_resolver:
            raise ConfigError("serve: a cluster has no resolver: its registry knows every adapter")
        made = cls(engine=engine, **values)
        made._check()
        return made

    def _check(self) -> None:
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), f.type
            if kind is float and isinstance(value, int):
                continue
            if kind in (int, float, str) and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ConfigError(f"{f.name}: {value!r:.60} is not of type {kind.__name__}")
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(f"replicas: {self.min_replicas} to {self.max_replicas}: expected 1 or more, min <= max")
        if self.factor <= 1:
            raise ConfigError(f"factor: {self.factor}: must be above 1")
        for name in ("ingresses", "cpus", "slack", "target_requests", "target_pressure", "report_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: must be above 0")
        if self.copies < 1:
            raise ConfigError("copies: must be 1 or more")
        if self.retries < 0:
            raise ConfigError("retries: must be 0 or more")


def _replicas(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        if set(value) - {"min", "max"}:
            raise ConfigError(f"replicas: expected a number, or min and max, not {sorted(map(str, value))}")
        least = value.get("min", 1)
        return {"min_replicas": least, "max_replicas": value.get("max", least)}
    return {"min_replicas": value, "max_replicas": value}
