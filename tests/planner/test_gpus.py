"""GPUs by name."""

import pytest

from multilora.errors import ConfigError
from multilora.planner.gpus import GPUS, gpu_model


def test_by_name():
    assert gpu_model("H200") is GPUS["h200"] and GPUS["h200"].measured
    assert not gpu_model("l40s").measured
    with pytest.raises(ConfigError, match="--gpu tpu is not known; there are: h200, h100"):
        gpu_model("tpu")


def test_units():
    assert all(20 << 30 < gpu.memory < 200 << 30 for gpu in GPUS.values())
    assert all(1e11 < gpu.read < 1e13 and 1e13 < gpu.matmul < 1e16 for gpu in GPUS.values())
    assert all(1e10 < gpu.link < 1e11 for gpu in GPUS.values())
