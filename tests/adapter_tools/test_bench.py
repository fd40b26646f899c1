"""What an adapter costs, on the CPU with a tiny model: that everything is there and sane."""

from functools import partial

import pytest
from fakes.models import make_adapter, make_tiny_model

from multilora.adapter_tools.bench import StepCosts, bench
from multilora.adapter_tools.inspect import inspect
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine
from multilora.errors import ConfigError


@pytest.fixture(autouse=True)
def inline(monkeypatch):
    """An engine without a loader process."""
    monkeypatch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    make_tiny_model(path / "model")
    make_adapter(path / "adapter", path / "model", target_modules=["q_proj"], r=4)
    return path


def test_costs(path):
    where = str(path / "adapter"), str(path / "model")
    found = bench(*where, batches=(1, 2), prompt=8, steps=2, repeats=1, device="cpu")
    assert (found.device, found.dtype, found.rank, found.prompt) == ("cpu", "float32", 4, 8)
    assert found.nbytes == inspect(*where).served.nbytes
    assert found.load_seconds > 0 and found.first_ms >= 0
    assert [cost.batch for cost in found.decode] == [cost.batch for cost in found.prefill] == [1, 2]
    assert all(cost.base_ms > 0 and cost.adapter_ms > 0 for cost in found.prefill)


def test_over():
    assert StepCosts(1, 2.0, 3.0).over_percent == pytest.approx(50)


@pytest.mark.parametrize(("options", "named"), [({"batches": (0,)}, "--batch"), ({"steps": 0}, "--steps")])
def test_bad_numbers(path, options, named):
    with pytest.raises(ConfigError, match=named):
        bench(str(path / "adapter"), str(path / "model"), **options)
