"""How memory is divided: by the engine's own plan."""

from dataclasses import replace

import pytest

from multilora.errors import OutOfMemory
from multilora.planner.capacity import capacity
from multilora.planner.gpus import GPUS
from scripts.calibrate_planner import llama

H200 = GPUS["h200"]
USUAL = dict(rank=16, request_tokens=640, running=64, chunk_tokens=2048, mem_fraction=0.9, host_bytes=None)


def test_an_8b_model_on_an_h200():
    found = capacity(llama(), H200, **USUAL)
    assert found.adapter_pages == 40 and found.memory.page_bytes == 2 << 20  # as docs/memory.md has it
    assert found.request_pages == 40
    assert found.memory.arena_bytes < 0.9 * (H200.memory - llama().weight_bytes)
    assert found.memory.arena_bytes > 0.8 * (H200.memory - llama().weight_bytes)
    room = found.memory.num_pages - 64 * 40
    assert found.device_adapters == room // 40
    assert found.host_adapters is None


def test_what_each_limit_moves():
    found = capacity(llama(), H200, **USUAL)
    assert capacity(llama(), H200, **USUAL | {"rank": 64}).adapter_pages == 160
    assert capacity(llama(), H200, **USUAL | {"host_bytes": 84 << 20}).host_adapters == 1
    fewer = capacity(llama(), H200, **USUAL | {"running": 256})
    assert fewer.device_adapters < found.device_adapters
    assert capacity(llama(), H200, **USUAL | {"mem_fraction": 0.5}).memory.num_pages < found.memory.num_pages
    assert capacity(llama(), H200, **USUAL | {"chunk_tokens": 8192}).memory.num_pages < found.memory.num_pages
    given = capacity(llama(), H200, **USUAL, arena_bytes=64 << 20)
    assert given.memory.num_pages == 32 and given.device_adapters == 0


def test_a_gpu_that_is_too_small():
    with pytest.raises(OutOfMemory):
        capacity(llama(), replace(H200, memory=16 << 30), **USUAL)
