"""The flags of `multilora plan`: each is a field of `Workload`."""

import dataclasses

import pytest

from multilora.cli import parser as cli
from multilora.errors import ConfigError
from multilora.planner.planner import Workload

GIVEN = {
    "gpu": "h100",
    "tp_size": 2,
    "adapters": 500,
    "rank": 32,
    "target_modules": ("q_proj", "v_proj"),
    "rps": 20.0,
    "prompt": 100,
    "answer": 50,
    "skew": 1.0,
    "first_token": 0.5,
    "host_bytes": 64 << 30,
    "max_running_requests": 128,
    "chunked_prefill_size": 512,
    "mem_fraction_static": 0.8,
    "page_size": 32,
    "dtype": "float16",
    "kv_cache_dtype": "fp8_e4m3",
    "quantization": "fp8",
}


def test_every_field_has_a_flag():
    assert {field.name for field in dataclasses.fields(Workload)} == {"model_path", *GIVEN}
    argv = ["plan", "--model", "m"]
    for name, value in GIVEN.items():
        values = value if isinstance(value, tuple) else ("64GiB" if name == "host_bytes" else value,)
        argv += [f"--{name.replace('_', '-')}", *map(str, values)]
    args = cli.parse([*argv, "--plot", "p.svg", "--json"])
    assert args.question == {"model_path": "m", **GIVEN} and args.plot == "p.svg" and args.json
    assert Workload(**args.question).rank == 32


def test_defaults_are_those_of_the_workload():
    args = cli.parse(["plan", "--model", "m"])
    assert args.question == {"model_path": "m"} and not args.json and args.plot is None


def test_the_server_s_defaults_are_the_planner_s():
    from multilora.config import Config

    for name in ("max_running_requests", "chunked_prefill_size", "mem_fraction_static", "page_size"):
        assert getattr(Workload("m"), name) == getattr(Config(), name)


def test_wrong():
    with pytest.raises(ConfigError, match="--model-path"):
        cli.parse(["plan"])
    with pytest.raises(ConfigError, match="--rank"):
        cli.parse(["plan", "--model", "m", "--rank", "many"])
    with pytest.raises(ConfigError, match="is not a size"):
        cli.parse(["plan", "--model", "m", "--host-bytes", "lots"])
