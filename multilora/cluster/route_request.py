"""What a router is told: of a request, before a replica is chosen for it, and by each replica of itself.

Records without behaviour, but for the keys of a prompt's prefixes. Names are full names of adapters; a version is the
cluster's, see `cluster_table.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

PREFIX_CHARS = 256  # of the first key; each further one covers twice as many
MAX_PREFIX_KEYS = 8


@dataclass(frozen=True, slots=True)
class AdapterNeed:
    """One version of an adapter, and what it takes where it is brought. nbytes 0: not known."""

    name: str
    version: int = 0
    nbytes: int = 0

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.version


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """adapter: None: the base model. cost: what it adds to a replica's load, in the unit of `ReplicaReport.load`.
    prompt: tokens that have to be read before it answers, about. prefixes: keys of the prompt's beginnings, the
    longest first. session: what the client calls its conversation. avoid: replicas that have failed it already.
    number: of this attempt, in the process that sends it."""

    adapter: AdapterNeed | None = None
    cost: float = 1.0
    prompt: int = 0
    prefixes: tuple[int, ...] = ()
    session: str = ""
    avoid: frozenset[str] = frozenset()
    number: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica says of itself. device, host: version by name of the adapters on the device and, of the others,
    in host memory. load: of all requests that it has, whoever sent them. weight: what it can do, where a replica
    with one GPU is 1. adapter_bytes: what it can hold of adapters without reading them again; 0: no limit is known.
    prompt: tokens of prompts that it has not answered yet."""

    load: float = 0.0
    weight: float = 1.0
    device: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    adapter_bytes: int = 0
    prompt: int = 0


def prefix_keys(scope: str, text: str) -> tuple[int, ...]:
    """Keys of the beginnings of a prompt, of 256, 512, 1024 … characters, the longest first. scope: what must be
    equal, too, for two prompts to share anything, such as the adapter's name."""
    state, keys, done = blake2b(scope.encode(errors="surrogatepass"), digest_size=8), list[int](), 0
    size = PREFIX_CHARS
    while size <= len(text) and len(keys) < MAX_PREFIX_KEYS:
        state.update(text[done:size].encode(errors="surrogatepass"))
        keys.append(int.from_bytes(state.digest(), "big"))
        done, size = size, 2 * size
    return tuple(reversed(keys))
