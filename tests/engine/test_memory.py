"""The largest step before the arena is there. How much it takes can only be measured on a GPU: test_gpu.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_tiny_model
from loaded_model import loaded_model

from multilora.attention.backends import make_attention
from multilora.engine import memory
from multilora.engine.memory import asking_for, graph_bytes, largest_step
from multilora.errors import OutOfMemory


@pytest.mark.parametrize("tokens", [1, 31, 32, 100])
def test_the_largest_step_has_every_token_and_all_logits(tokens: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Prompts no longer than the context, each in pages of its own."""
    make_tiny_model(tmp_path, max_position_embeddings=32)
    model = loaded_model(tmp_path)
    layout = model.kv_layout(page_size=4)
    seen: list[Any] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda rows, ctx: seen.append(rows.shape) or logits(rows, ctx))

    def over_arena(views: Any) -> Any:
        attention = make_attention("torch", views, model.attention_shape)
        prepare = attention.prepare
        monkeypatch.setattr(attention, "prepare", lambda meta: seen.append(meta) or prepare(meta))
        return attention

    nbytes = largest_step(model, layout, over_arena, tokens, requests=8)
    meta, rows = seen
    assert sum(meta.q_lens) == tokens and max(meta.q_lens) <= 32 and meta.q_lens == meta.kv_lens
    assert rows == (tokens, model.config.hidden_size)
    slots = set(zip(meta.token_page.tolist(), meta.token_slot.tolist(), strict=True))
    assert len(slots) == tokens, "two tokens in one place"
    assert nbytes == (int(meta.token_page.max()) + 1) * layout.page_bytes


def test_who_asked_for_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    said = r"an arena of 2 pages: .*\(1.0 GiB of 80.0 GiB were left\); lower --this"
    with pytest.raises(OutOfMemory, match=said), asking_for("an arena of 2 pages", "lower --this"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ValueError, match="other"), asking_for("an arena", "lower"):
        raise ValueError("other errors pass")


def test_graphs_keep_their_rows() -> None:
    assert graph_bytes([1, 2], 1000, 2) == 2 * 2 * memory.GRAPH_BYTES + 3 * 3 * 1000
    assert graph_bytes([1], 1000, 1, pieces=3) == memory.GRAPH_BYTES + 3 * memory.PIECE_BYTES + 2 * 1000
    assert graph_bytes([], 1000, 2) == 0
