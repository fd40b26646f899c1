"""Releases the device memory of an engine at rest, and takes it again: the arena and the base model's weights.

Every tensor stays the object that it is; only its storage is emptied and filled again (as FSDP does it), so all views
of the arena and of the weights remain valid. The new memory has other addresses: CUDA graphs, which hold addresses,
are dropped before and captured anew afterwards. (vLLM's CuMem allocator keeps the addresses instead, by mapping
physical memory in C++; that saves the seconds of the captures and costs a native extension. torch's expandable
segments and `torch.cuda.MemPool` cannot unmap the memory of a live tensor.) On CPU the memory returns to the system.

With several ranks each has such an object and does the same; they agree on what has been restored before any of them
captures a graph, as a capture runs collectives.

Called by `pause_control.py` while no step is in flight; nothing may read arena or weights until they are restored.
"""

import ctypes
import gc
import logging
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Protocol

import torch

from multilora.engine.memory import asking_for
from multilora.engine.messages import MemoryTag
from multilora.errors import MultiloraError, OutOfMemory
from multilora.layers.weights.base import Weight
from multilora.memory.plan import format_bytes
from multilora.models.base import CausalLM

logger = logging.getLogger(__name__)

ADVICE = "free what else uses the device and wake the engine up again"


class _Tensors:
    """Tensors with a storage each, which is emptied and filled again."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self._tensors = [tensor.detach() for tensor in tensors]
        self._sizes = [max(t.untyped_storage().nbytes(), t.numel() * t.element_size()) for t in self._tensors]
        self._copies: list[torch.Tensor] = []  # in host memory, of as many of the first tensors

    @property
    def nbytes(self) -> int:
        return sum(self._sizes)

    def keep(self) -> None:
        """Copy all of them to host memory."""
        self._copies = [tensor.to("cpu", copy=True) for tensor in self._tensors]

    @property
    def kept(self) -> bool:
        return bool(self._copies)

    def release(self) -> None:
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)

    def allocate(self) -> None:
        """Give each its memory again; what is in it is undefined."""
        for tensor, size in zip(self._tensors, self._sizes, strict=True):
            if tensor.untyped_storage().nbytes() < size:
                tensor.untyped_storage().resize_(size)

    def fill(self) -> None:
        """Copy back what `keep` has kept."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
        self._copies = []

    def clear(self) -> None:
        for tensor in self._tensors:
            tensor.zero_()


class Peers(Protocol):
    """The other ranks, as the one that is told to sleep sees them; a rank that follows has only `agree`."""

    def release_memory(self, tags: list[MemoryTag], level: int) -> None:
        """Have the others begin `DeviceSleep.release`."""
        ...

    def restore_memory(self, tag: MemoryTag) -> None:
        """Have the others begin `DeviceSleep.restore`."""
        ...

    def agree(self, done: bool) -> list[int]:
        """Wait until all have come here. Returns the ranks that were not `done`."""
        ...


class DeviceSleep:
    """The memory of one rank.

    reload: reads the weights into the model again; use_graphs(False) drops the CUDA graphs, use_graphs(True) captures
    them, where there are some.
    """

    def __init__(
        self,
        model: CausalLM,
        arena: torch.Tensor,
        reload: Callable[[], None],
        peers: Peers,
        use_graphs: Callable[[bool], None] = lambda _captured: None,
    ):
        self.released: set[MemoryTag] = set()
        self.use_graphs = use_graphs
        self._peers = peers
        self._device = arena.device
        self._reload = reload
        self._weights = _Tensors(model.parameters())
        self._matrices = [module for module in model.modules() if isinstance(module, Weight)]
        self._arena = _Tensors([arena])
        self._discarded = False  # the weights have to be read again

    @property
    def has_weights(self) -> bool:
        """Whether the base model's weights can be read."""
        return "weights" not in self.released

    @torch.no_grad()
    def release(self, tags: Iterable[MemoryTag], level: int) -> None:
        """Free what these tags name and is not free yet. At level 1 the weights are kept in host memory, which on
        CPU is where they are."""
        began, fresh = monotonic(), set(tags) - self.released
        if not fresh:
            return
        self._peers.release_memory(sorted(fresh), level)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if not self.released:
            self.use_graphs(False)
        freed = 0
        if "kv_cache" in fresh:
            self._arena.release()
            freed += self._arena.nbytes
        if "weights" in fresh and (level > 1 or self._device.type != "cpu"):
            if level == 1:
                self._weights.keep()
            self._discarded = level > 1
            for matrix in self._matrices if self._discarded else ():
                matrix.drop()
            self._weights.release()
            freed += self._weights.nbytes
        self.released |= fresh
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            trim_heap()
        self._peers.agree(True)
        logger.info(
            "asleep: %s of %s released in %.2f s",
            format_bytes(freed),
            " and ".join(sorted(fresh)),
            monotonic() - began,
        )

    @torch.no_grad()
    def restore(self, tags: Iterable[MemoryTag]) -> None:
        """Take back what these tags name and is free, the weights first. Raises OutOfMemory, and ConfigError or
        ModelUnsupported where discarded weights cannot be read again; what had been restored by then stays."""
        began, wanted = monotonic(), sorted(self.released & set(tags), reverse=True)
        for tag in wanted:
            self._restore(tag)
        if wanted:
            logger.info("%s restored in %.2f s", " and ".join(wanted), monotonic() - began)

    def _restore(self, tag: MemoryTag) -> None:
        """One of them, on all ranks, and after the last one the graphs."""
        self._peers.restore_memory(tag)
        error: MultiloraError | None = None
        try:
            with asking_for("waking up", ADVICE):
                if tag == "weights":
                    self._restore_weights()
                else:
                    self._restore_arena()
        except MultiloraError as e:
            error = e
        failed = self._peers.agree(error is None)
        if error is not None:
            raise error
        if failed:
            raise OutOfMemory(f"waking up: rank {failed[0]} does not get its {tag} back, its log says why; {ADVICE}")
        self.released.discard(tag)
        if not self.released:
            with asking_for("waking up", ADVICE):
                self.use_graphs(True)

    def _restore_weights(self) -> None:
        self._weights.allocate()
        if self._weights.kept:
            self._weights.fill()
        elif self._discarded:
            self._reload()
            self._discarded = False

    def _restore_arena(self) -> None:
        self._arena.allocate()
        self._arena.clear()


def trim_heap() -> None:
    """Return the free memory of this process' heap to the system, where the C library can (glibc): it may have taken
    even an arena from a hole in its heap, and would keep that hole."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
