"""What a GPU must hold beside weights and arena, measured before the arena is there; and who asked for too much.

Runs the largest step once over a few pages of its own. Called by `build_rank.py`, at start.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from multilora.attention.base import AttentionBackend, AttentionShape, KVViews
from multilora.batch import AttentionMeta, ColumnPages
from multilora.engine.sampling.sampler import Sampler
from multilora.engine.sampling.state import SamplingState
from multilora.errors import OutOfMemory
from multilora.layers.context import ForwardContext
from multilora.lora.sites import LoraSite
from multilora.memory.kv_layout import KVLayout
from multilora.memory.plan import format_bytes
from multilora.models.base import CausalLM
from multilora.params import SamplingParams

MakeAttention = Callable[[KVViews], AttentionBackend]

GRAPH_BYTES = 4 << 20
"""Bytes of all graphs of one batch size, beside input and result: nodes, and a plan in the attention backend."""

PIECE_BYTES = 256 << 10
"""Bytes of the graph of one piece of a step, between two attentions."""


@contextmanager
def asking_for(what: str, lower: str) -> Iterator[None]:
    """Out of memory inside means that this was too much. Raises OutOfMemory, which says how to ask for less."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        raise OutOfMemory(
            f"{what}: not enough GPU memory ({format_bytes(free)} of {format_bytes(total)} were left); {lower}"
        ) from e


def measure_step(model: CausalLM, layout: KVLayout, make_attention: MakeAttention, tokens: int, requests: int) -> int:
    """Bytes that the largest step takes at its peak, the attention backend's workspace included. CUDA only."""
    device = model.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    arena_bytes = largest_step(model, layout, make_attention, tokens, requests)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak - arena_bytes


def largest_step(model: CausalLM, layout: KVLayout, make_attention: MakeAttention, tokens: int, requests: int) -> int:
    """`tokens` new prompt tokens, the logits of every one of them (prompt logprobs), `requests` random tokens drawn
    from those, all with penalties. Returns the bytes of its own little arena."""
    context = model.config.context_length
    lens = [min(context, tokens - at) for at in range(0, tokens, context)]
    pages = sum([layout.pages_for(n) for n in lens])
    arena = torch.zeros(pages, layout.page_bytes, dtype=torch.uint8, device=model.device)
    attention = make_attention(layout.views(arena))
    meta = _fresh_prompts(lens, layout, model.device)
    positions = torch.cat([torch.arange(n) for n in lens]).to(model.device)
    ctx = ForwardContext(attention, None)
    count, vocab_size = min(requests, tokens), model.config.vocab_size
    sampler = Sampler(vocab_size, model.device)
    params = SamplingParams(top_p=0.9, top_k=50, repetition_penalty=1.05)
    for slot in range(count):
        sampler.install(SamplingState(slot=slot, params=params, seed=0, vocab_size=vocab_size))
    with torch.inference_mode():
        attention.prepare(meta)
        x = model.embed(torch.zeros_like(positions), ctx)
        hidden = model(x, positions, ctx)
        if model.config.generates:
            sampler.sample(model.logits(hidden, ctx)[:count], range(count), [0] * count)
    return arena.numel()


def _fresh_prompts(lens: list[int], layout: KVLayout, device: torch.device) -> AttentionMeta:
    """Metadata of prompts of `lens` tokens with nothing cached, whose pages lie one after the other, column after
    column."""
    size, columns = layout.page_size, layout.columns
    blocks = [-(-n // size) for n in lens]
    table = torch.zeros(columns, len(lens), max(blocks), dtype=torch.int64)
    first, token_pages = 0, []
    for r, (count, length) in enumerate(zip(blocks, lens, strict=True)):
        pages = torch.arange(first, first + columns * count).view(columns, count)
        table[:, r, :count] = pages
        token_pages.append(pages.repeat_interleave(size, dim=1)[:, :length])
        first += columns * count
    slots = torch.cat([torch.arange(n) % size for n in lens]).to(device)
    parts = zip(table.to(device), torch.cat(token_pages, dim=1).to(device), strict=True)
    own, *further = [ColumnPages(*part) for part in parts]
    return AttentionMeta(tuple(lens), tuple(lens), own.page_table, own.token_page, slots, tuple(further))


def list_bytes_per_page(shape: AttentionShape, num_layers: int, rows: int) -> int:
    """Bytes that page lists of captured decodes of up to so many rows have for each page of the arena: each request
    may have all of them, in each view (see `attention/paged.py`)."""
    return 4 * rows * len({(shape.window_of(i), shape.column_of(i)) for i in range(num_layers)})


def activation_bytes(sites: Sequence[LoraSite], hidden_size: int, itemsize: int) -> int:
    """Bytes that a row takes in a layer at its peak, about: what the widest matrix reads and writes, the activation
    of that, and the residual."""
    widest = max(site.out_features + site.in_features for site in sites if site.layer >= 0)
    return 2 * itemsize * (widest + 2 * hidden_size)


def graph_bytes(sizes: Sequence[int], row_bytes: int, variants: int, pieces: int = 0) -> int:
    """Bytes of the graphs of these numbers of rows, `variants` of each, each in so many pieces (0: it is
    one). The graphs of a size share their input, each has its own result; row_bytes: of one row of those."""
    each = GRAPH_BYTES + pieces * PIECE_BYTES
    return sum(variants * each + (1 + variants) * row_bytes * size for size in sizes)
