"""A trainer's tensors through shared memory: the message is what the server takes, and the segment goes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multilora.adapter_tools.share import SharedAdapter
from multilora.server.tensors import LoadTensorsBody

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(5).to(torch.bfloat16),
    "none": torch.empty(0, 4),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def test_what_the_server_reads_is_what_was_written(tmp_path: Path) -> None:
    with SharedAdapter(TENSORS) as shared:
        message = shared.message("policy", {"r": 1}, weight_version="7")
        assert (message["lora_name"], message["upsert"], message["weight_version"]) == ("policy", True, "7")
        for step in range(2):
            now = {name: tensor + step for name, tensor in TENSORS.items()}
            shared.write(now)
            path = tmp_path / f"{step}.safetensors"
            LoadTensorsBody.model_validate(message).writer()(path)
            found = load_file(path)
            assert found.keys() == now.keys()
            assert all(torch.equal(found[name], now[name]) for name in now)
        segment = Path("/dev/shm", shared.segment)
        assert segment.exists()
    assert not segment.exists()


def test_other_tensors_do_not_fit() -> None:
    with SharedAdapter(TENSORS) as shared:
        for other in ({}, TENSORS | {"a": torch.zeros(3, 2)}, TENSORS | {"b": torch.zeros(5)}):
            with pytest.raises(ValueError, match="differ"):
                shared.write(other)


def test_no_tensors_at_all() -> None:
    with SharedAdapter({}) as shared:
        assert shared.message("x", {})["tensors"] == []
