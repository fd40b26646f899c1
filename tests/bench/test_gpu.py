"""`python -m bench.gpu` from end to end, with a tiny model on the CPU: every row is there and holds numbers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu.sizes import SIZES, ExpertAdapters, MoeDims, write_model
from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.checkpoint import read_adapter
from multilora.models.load import make_model

ROOT = Path(__file__).parents[2]
ROWS = {  # part → rows
    "decode": 8,
    "sampling": 9,
    "base_only": 2,
    "low_ranks": 1,
    "prompts": 4,
    "contexts": 4,
    "shared": 2,
    "throughput": 4,
    "few_places": 1,
    "cold": 2,
    "streams": 1,
    "many": 1,
    "slora": 3,
    "swap": 2,
    "fresh": 1,
}


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The finished command. Its milliseconds are differences of few and short runs here: whatever else the machine
    does may turn their sign."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "bench.gpu", "--dims", "tiny", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "results" / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--dims", "tiny", "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads(out.read_text())
    return last


@pytest.mark.slow
def test_every_row_is_measured(result: dict[str, Any]) -> None:
    assert result["failed"] == {}
    assert len(result["rows"]) == sum(ROWS.values())
    assert set(result["seconds"]) == {"start", *ROWS, "all"}
    assert all(math.isfinite(row["value"]) for row in result["rows"])  # a difference may be below 0: see run()
    rates = [row["value"] for row in result["rows"] if row["unit"].endswith("/s")]
    assert rates and min(rates) > 0
    for row in result["rows"]:
        assert row["unit"] in ("ms", "ratio", "tokens/s", "swaps/s", "adapters/s", "of 1")
        assert "target" not in row, "targets are those of another model"


def test_the_sizes_of_a_mixture_are_those_of_the_model(tmp_path: Path) -> None:
    dims, _ = SIZES["tiny-moe"]
    assert isinstance(dims, MoeDims)
    model = make_model(write_model(tmp_path / "model", dims), device=torch.device("meta"))
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and ".layers." in name)
    assert dims.parameters == matrices
    whole, _ = SIZES["qwen3-30b-a3b"]
    assert isinstance(whole, MoeDims)
    assert round((whole.parameters + 2 * whole.hidden * whole.vocab) / 1e9, 1) == 30.5
    one, all_taken = (whole.step_bytes(batch, 0, []) for batch in (1, 10_000))
    assert all_taken - one == pytest.approx(2 * 120 * whole.expert_parameters)
    ExpertAdapters(tmp_path, dims, torch.device("cpu")).write("a", 4)
    base = BaseModel.of(model, None)
    adapter = read_adapter(tmp_path / "a", base, AdapterLimits())
    assert adapter.target_modules == ["experts.down_proj", "experts.gate_up_proj"]
    assert sum(b.a.nbytes + b.b.nbytes for b in adapter.blocks) == dims.expert_adapter_bytes(4, 10_000)


@pytest.mark.slow
def test_dims_without_experts_have_no_rows_about_them() -> None:
    done = run("--device", "cpu", "--only", "experts")
    assert done.returncode == 2
    assert "--dims tiny has no experts" in done.stderr


@pytest.mark.slow
def test_the_rows_of_a_mixture_of_experts() -> None:
    done = run("--dims", "tiny-moe", "--device", "cpu", "--only", "experts")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["unit"] for row in rows] == ["ratio"] * 3
    assert all(math.isfinite(row["value"]) and "target" not in row for row in rows)


@pytest.mark.slow
def test_large_batches_need_an_engine_that_takes_them(tmp_path: Path) -> None:
    refused = run("--device", "cpu", "--only", "large")
    assert refused.returncode == 2
    assert "rows large need --max-running-requests 12" in refused.stderr
    out = tmp_path / "old.json"
    options = ("--device", "cpu", "--only", "large", "--max-running-requests", "12")
    done = run(*options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["unit"] for row in rows] == ["ms"] * 4 + ["tokens/s"] * 2
    again = run(*options, "--compare", str(out))
    assert again.returncode == 0, again.stderr
    assert "decode, batch 12, 8 distinct rank-16" in again.stdout and " worse\n" in again.stdout
    assert len(json.loads(again.stdout.splitlines()[-1])["rows"]) == 6


@pytest.mark.slow
def test_all_fresh_adapters_came_and_went(result: dict[str, Any]) -> None:
    [fresh] = [row for row in result["rows"] if row["unit"] == "adapters/s"]
    assert fresh["adapters"] == fresh["wanted"] == 20


@pytest.mark.slow
def test_the_run_says_where_it_ran(result: dict[str, Any]) -> None:
    assert result["command"].startswith("python -m bench.gpu --dims tiny")
    assert result["cores"] >= 1 and "commit" in result and result["versions"]["torch"]
    assert result["read_bandwidth_tb_s"] > 0


@pytest.mark.slow
def test_adapters_take_turns_where_the_device_holds_few(result: dict[str, Any]) -> None:
    loads = {row["row"]: row["adapter_loads"] for row in result["rows"] if "adapter_loads" in row}
    [few] = [n for name, n in loads.items() if "--lora-device-bytes" in name]
    [many] = [n for name, n in loads.items() if "twice" in name]
    assert few >= 4 and many >= 10  # how many more depends on what is still resident from before


def test_limits_count_the_bytes_that_are_held() -> None:
    dims, _ = SIZES["llama-8b"]
    plain, held = dims.step_bytes(1, 0, []), dims.step_bytes(1, 0, [], weight_bits=8)
    assert plain - held == dims.parameters
    with_kv = dims.step_bytes(4, 100, [], kv_bits=8) - plain
    assert with_kv == 4 * 100 * dims.kv_bytes() / 2
    moe, _ = SIZES["qwen3-30b-a3b"]
    assert isinstance(moe, MoeDims)
    of_experts = moe.experts * (1 - (1 - moe.top_k / moe.experts) ** 4) * moe.expert_parameters
    others = moe.parameters - moe.experts * moe.expert_parameters
    plain, eight, four = (moe.step_bytes(4, 0, [], weight_bits=bits) for bits in (16, 8, 4))
    assert plain - eight == pytest.approx(of_experts + others)
    assert plain - four == pytest.approx(1.5 * others), "bitsandbytes leaves experts"
