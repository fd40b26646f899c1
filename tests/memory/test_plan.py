"""Covers `kv_layout.py`."""

import pytest
import torch

from multilora.errors import OutOfMemory
from multilora.memory.kv_layout import KVLayout
from multilora.memory.plan import DeviceMemory, format_bytes, plan_memory

LLAMA_8B = KVLayout(num_layers=32, page_size=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)


def plan(**fields):
    defaults = dict(
        weight_bytes=0,
        context_length=8192,
        max_running_requests=64,
        arena_bytes=None,
        max_total_tokens=None,
        device=None,
        mem_fraction_static=0.9,
    )
    return plan_memory(LLAMA_8B, **defaults | fields)


def test_llama_8b_page_is_two_mebibytes():
    assert LLAMA_8B.page_bytes == 2 << 20


@pytest.mark.parametrize(
    ("fields", "pages"),
    [
        ({"arena_bytes": 8 << 30}, 4096),
        ({"max_total_tokens": 100}, 7),
        ({"device": DeviceMemory(100 << 30, 0, 0), "mem_fraction_static": 0.5}, 25600),
        ({"device": DeviceMemory(100 << 30, 15 << 30, 5 << 30), "mem_fraction_static": 0.5}, 20480),
        ({"device": DeviceMemory(100 << 30, 0, 0, table_bytes=2 << 20), "mem_fraction_static": 0.5}, 12800),
        ({"device": DeviceMemory(100 << 30, 15 << 30, 5 << 30), "arena_bytes": 80 << 30}, 40960),
        ({}, 512),  # CPU: at most 1 GiB
        ({"context_length": 64, "max_running_requests": 2}, 16),
    ],
)
def test_sizes(fields, pages):
    assert plan(**fields).num_pages == pages


def test_too_small_or_too_large_is_refused_with_the_flag():
    with pytest.raises(OutOfMemory, match="--arena-bytes"):
        plan(arena_bytes=1 << 20)
    with pytest.raises(OutOfMemory, match="--max-total-tokens"):
        plan(max_total_tokens=10**6, device=DeviceMemory(1 << 30, 0, 0))


def test_out_of_memory_says_what_asked_for_how_much():
    device = DeviceMemory(free=10 << 30, step_bytes=3 << 30, graph_bytes=2 << 30)
    with pytest.raises(OutOfMemory) as caught:
        plan(device=device, weight_bytes=15 << 30, arena_bytes=6 << 30)
    message = caught.value.message
    for said in ("arena asks for 6.0 GiB (--arena-bytes)", "15.0 GiB", "10.0 GiB are free", "3.0 GiB", "2.0 GiB"):
        assert said in message
    assert (
        "lower --arena-bytes" in message and "--chunked-prefill-size" in message and "--disable-cuda-graph" in message
    )
    with pytest.raises(OutOfMemory, match=r"a step takes 11\.0 GiB"):
        plan(device=DeviceMemory(10 << 30, 11 << 30, 0))


def test_the_plan_in_words():
    text = str(plan(device=DeviceMemory(10 << 30, 3 << 30, 2 << 30), weight_bytes=15 << 30, mem_fraction_static=0.8))
    assert text.startswith("weights 15.0 GiB, a step 3.0 GiB, CUDA graphs 2.0 GiB, arena 4.0 GiB: 2048 pages of 16")
    assert "sized by --mem-fraction-static 0.8 of 5.0 GiB" in text
    assert str(plan()).startswith("weights 0 B, arena 1.0 GiB: 512 pages of 16 tokens")


def test_views_are_strided_windows_on_the_arena():
    layout = KVLayout(num_layers=2, page_size=3, num_kv_heads=2, head_dim=4, dtype=torch.float32)
    arena = torch.zeros(5, layout.page_bytes, dtype=torch.uint8)
    views = layout.views(arena)
    k, v = views[1]
    assert k.shape == v.shape == (5, 3, 2, 4)
    k[4, 2] = 1.0
    assert arena.view(torch.float32).count_nonzero() == 8
    assert views[0][0].count_nonzero() == views[1][1].count_nonzero() == 0
    with pytest.raises(ValueError, match="arena must be"):
        layout.views(arena[:, 1:])


def test_format_bytes():
    assert [format_bytes(n) for n in (5, 1536, 2 << 20, 3 << 40)] == ["5 B", "1.5 KiB", "2.0 MiB", "3072.0 GiB"]


GEMMA_3_1B = [None if layer % 6 == 5 else 512 for layer in range(26)]


def windowed(*windows: int | None, page_size: int = 4) -> KVLayout:
    return KVLayout(len(windows), page_size, 2, 4, torch.float32, windows)


def test_layers_that_see_everything_fill_their_pages_and_the_others_take_as_many_as_they_need():
    layout = windowed(*GEMMA_3_1B, page_size=16)
    assert layout.layers_per_page == 4
    assert [(g.window, g.columns, len(g.layers)) for g in layout.groups] == [(None, 1, 4), (512, 6, 22)]
    assert layout.page_bytes == 4 * 2 * 16 * 2 * 4 * 4
    assert layout.pages_for(1000) == 63 * 7
    assert layout.most_pages(1000, 0) == 63 + 6 * 33


@pytest.mark.parametrize(
    ("windows", "each", "columns"),
    [
        ([None] * 8, 8, 1),
        ([7] * 8, 8, 1),  # Mistral, Phi-3
        ([128, None] * 12, 12, 2),  # gpt-oss
        ([4096, 4096, 4096, None] * 8, 8, 4),  # OLMo 3
        ([1024] * 52 + [None] * 10, 10, 7),  # Gemma 3 27B
        ([64] * 35 + [None], 5, 8),  # never more than 8 pages of a block
        ([None, 8, 16, 8], 1, 4),
    ],
)
def test_how_many_layers_a_page_has(windows, each, columns):
    layout = windowed(*windows)
    assert (layout.layers_per_page, layout.columns) == (each, columns)
    found = [layer for group in layout.groups for layer in group.layers]
    assert sorted(found) == list(range(len(windows)))


def test_every_layer_has_bytes_of_its_own_in_the_pages_of_its_column():
    layout = windowed(8, None, 8, 8, 8)
    assert (layout.layers_per_page, layout.layer_columns) == (1, (1, 0, 2, 3, 4))
    layout = windowed(8, None, 8, None, 8, 8)
    assert (layout.layers_per_page, layout.layer_columns) == (2, (1, 0, 1, 0, 2, 2))
    arena = torch.zeros(layout.columns, layout.page_bytes, dtype=torch.uint8)
    for layer, (k, v) in enumerate(layout.views(arena)):
        for part in (k, v):
            assert not part[layout.layer_columns[layer]].any(), "another layer lies there"
            part[layout.layer_columns[layer]] = 1.0
    assert arena.view(torch.float32).count_nonzero() == 6 * 2 * 4 * 2 * 4


def test_a_text_never_holds_more_than_its_window_and_what_is_being_computed():
    layout, on_their_way = windowed(9, None), 6
    for computed in range(100):
        window = layout.groups[1]
        first = min(window.first_block(computed, 4), max(0, computed // 4 - 1))
        held = -(-(computed + on_their_way) // 4) - first
        assert held <= layout.most_pages(1000, on_their_way) - 250
