"""How a GPU's memory is divided: weights, the largest step, CUDA graphs, and the arena in which KV and adapters lie.

The arena's size is decided by the engine's own `plan_memory`; what the engine measures at start (the largest step) is
estimated here. Called by `planner.py`.
"""

from dataclasses import dataclass

from multilora.engine.execution.cuda_graphs import MOST_DECODES, MOST_PIECE_ROWS, decode_sizes, piece_sizes
from multilora.engine.memory import activation_bytes, graph_bytes, list_bytes_per_page
from multilora.memory.plan import DeviceMemory, MemoryPlan, plan_memory
from multilora.planner.facts import ModelFacts
from multilora.planner.gpus import GpuModel

CONTEXT_BYTES = 700 << 20
"""Bytes that CUDA, its libraries and PyTorch take before anything is there."""
WORKSPACE_BYTES = 640 << 20
"""Bytes of the attention backend's workspaces and of the matrix products'."""
LOGIT_BYTES = 10
"""Bytes of a logit in the largest step: as computed, in fp32, and once more as log-softmax."""


@dataclass(frozen=True)
class Capacity:
    """The arena in pages, what one request and one adapter take of it, and how many adapters fit beside all running
    requests (device) and in host memory (None: it is not known how much there is)."""

    memory: MemoryPlan
    request_pages: int
    adapter_pages: int
    device_adapters: int
    host_adapters: int | None

    @property
    def adapter_bytes(self) -> int:
        return self.adapter_pages * self.memory.page_bytes


def capacity(
    facts: ModelFacts,
    gpu: GpuModel,
    *,
    rank: int,
    request_tokens: int,
    running: int,
    chunk_tokens: int,
    mem_fraction: float,
    host_bytes: int | None,
    arena_bytes: int | None = None,
) -> Capacity:
    """Raises OutOfMemory if the model does not fit the GPU."""
    free = gpu.memory - CONTEXT_BYTES - facts.weight_bytes
    graphs = _graph_bytes(facts, running, chunk_tokens)
    device = DeviceMemory(free, _step_bytes(facts, chunk_tokens), graphs, _page_bytes(facts, running))
    memory = plan_memory(
        facts.layout,
        weight_bytes=facts.weight_bytes,
        context_length=facts.model.config.context_length,
        max_running_requests=running,
        arena_bytes=arena_bytes,
        max_total_tokens=None,
        device=device,
        mem_fraction_static=mem_fraction,
    )
    request_pages = facts.layout.most_pages(request_tokens, 2 * chunk_tokens)
    pages = facts.adapter_pages(rank)
    room = memory.num_pages - running * request_pages
    on_host = pages * memory.page_bytes * facts.tp_size  # host memory holds the pages of all ranks
    return Capacity(
        memory,
        request_pages,
        pages,
        max(0, room // pages) if pages else 0,
        None if host_bytes is None or not pages else host_bytes // on_host,
    )


def _page_bytes(facts: ModelFacts, running: int) -> int:
    """Bytes of tables and page lists for each page of the arena."""
    rows = max(decode_sizes(min(MOST_DECODES, running)))
    return facts.table_bytes + list_bytes_per_page(facts.model.attention_shape, facts.layers, rows)


def _step_bytes(facts: ModelFacts, chunk_tokens: int) -> int:
    """The largest step: logits of all its rows, and the widest activations of one layer."""
    row = LOGIT_BYTES * facts.model.config.vocab_size + _activation_bytes(facts)
    return chunk_tokens * row + WORKSPACE_BYTES


def _activation_bytes(facts: ModelFacts) -> int:
    config = facts.model.config
    return activation_bytes(facts.sites, config.hidden_size, config.dtype.itemsize)


def _graph_bytes(facts: ModelFacts, running: int, chunk_tokens: int) -> int:
    row = facts.model.config.hidden_size * facts.model.config.dtype.itemsize
    decode = graph_bytes(decode_sizes(min(MOST_DECODES, running)), row, 2)
    pieces = piece_sizes(min(MOST_PIECE_ROWS, chunk_tokens), running)
    return decode + graph_bytes(pieces, row, 2, pieces=1 + facts.layers) + _activation_bytes(facts) * pieces[-1]
