"""What Config accepts, what it refuses, and that it stays what it is."""

import dataclasses
import logging

import msgspec
import pytest
import torch

from multilora.adapters.device.eviction import EVICTION_POLICIES
from multilora.attention.backends import BACKENDS as ATTENTION_BACKENDS
from multilora.config import DTYPES, Config
from multilora.engine.scheduling.policy import POLICIES
from multilora.errors import ConfigError
from multilora.logs import LEVELS
from multilora.lora.backends import BACKENDS as LORA_BACKENDS
from multilora.lora_path import LoraPath
from multilora.options import options_of


def test_defaults_are_valid_and_frozen():
    config = Config()
    assert config.model_name == "multilora-demo"
    assert not config.enable_lora
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1  # type: ignore[misc]


def test_every_option_is_described():
    assert all(opt.help and opt.group for opt in options_of(Config))
    assert len({opt.flag for opt in options_of(Config)}) == len(dataclasses.fields(Config))


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/models/sql", LoraPath("/models/sql", "/models/sql")),
        ("sql=/models/sql", LoraPath("sql", "/models/sql")),
        ("sql=/models/a=b", LoraPath("sql", "/models/a=b")),
        ('{"lora_name": "sql", "lora_path": "/m", "pinned": true}', LoraPath("sql", "/m", True)),
        (' {"lora_name": "sql", "lora_path": "/m"} ', LoraPath("sql", "/m")),
        ({"lora_name": "sql", "lora_path": "/m"}, LoraPath("sql", "/m")),
        (LoraPath("a", "b"), LoraPath("a", "b")),
    ],
)
def test_lora_path_forms(given, path):
    assert LoraPath.parse(given) == path


@pytest.mark.parametrize(
    "given",
    [
        "",
        "=/models/sql",
        "sql=",
        "{not json",
        "{}",
        '{"lora_name": "sql"}',
        '{"lora_name": "", "lora_path": "/m"}',
        '{"lora_name": "sql", "lora_path": 3}',
        '{"lora_name": "sql", "lora_path": "/m", "pinned": "yes"}',
        '{"lora_name": "sql", "lora_path": "/m", "pined": true}',
        {"name": "sql"},
        3,
        None,
    ],
)
def test_lora_path_refuses(given):
    with pytest.raises(ConfigError, match="--lora-paths"):
        LoraPath.parse(given)


def test_lora_paths_turn_lora_on():
    assert Config.make(lora_paths=["a=/a"]).enable_lora


@pytest.mark.parametrize("paths", [{"a": "/a", "b": "/b"}, ["a=/a", "b=/b"], (LoraPath("a", "/a"), "b=/b")])
def test_lora_paths_in_any_container(paths):
    assert Config.make(lora_paths=paths).lora_paths == (LoraPath("a", "/a"), LoraPath("b", "/b"))


def test_make_converts():
    config = Config.make(
        arena_bytes="8GiB",
        lora_host_bytes=123,
        lora_root="/adapters",
        lora_target_modules=["q_proj"],
        dtype="half",
        lora_paths="a=/a",
    )
    assert config.arena_bytes == 8 * 2**30
    assert config.lora_host_bytes == 123
    assert config.lora_root == ("/adapters",)
    assert config.lora_target_modules == ("q_proj",)
    assert config.dtype == "float16"
    assert config.lora_paths == (LoraPath("a", "/a"),)


def test_flashinfer_backend_is_auto_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert Config.make(lora_backend="flashinfer").lora_backend == "auto"
    assert "flashinfer" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_lora_ranks": 8}, "unknown option 'max_lora_ranks'; did you mean 'max_lora_rank'?"),
        ({"max_loras_per_batch": 0}, "--max-loras-per-batch must be a positive integer, is 0"),
        ({"max_loras_per_batch": True}, "--max-loras-per-batch must be a positive integer"),
        ({"max_running_requests": None}, "--max-running-requests must be a positive integer"),
        ({"lora_backend": "cutlass"}, "--lora-backend must be one of auto, torch, cpp, triton, csgmv"),
        ({"lora_eviction_policy": "mru"}, "--lora-eviction-policy must be one of lru, fifo, cost"),
        ({"fair_output_weight": 0.0}, "--fair-output-weight must be between 0.001 and 1000, is 0.0"),
        ({"fair_tenant_weight": ("a",)}, "--fair-tenant-weight: 'a': expected NAME=WEIGHT"),
        ({"fair_tenant_weight": ("a=nan",)}, "--fair-tenant-weight a must be between 0.001 and 1000, is nan"),
        ({"schedule_policy": "sjf"}, "--schedule-policy must be one of fair, fcfs, lpm, priority, is 'sjf'"),
        (
            {"attention_backend": "fa3"},
            "--attention-backend must be one of auto, flashinfer, triton, cpp, torch, is 'fa3'",
        ),
        ({"dtype": "float8"}, "--dtype must be one of auto, float32, bfloat16, float16, is 'float8'"),
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda, is 'tpu'"),
        ({"log_level": "loud"}, "--log-level must be one of debug, info, warning, error, is 'loud'"),
        ({"max_lora_chunk_size": 17}, "--max-lora-chunk-size must be one of 16, 32, 64, 128, is 17"),
        ({"mem_fraction_static": 0.0}, "--mem-fraction-static must be over 0 and at most 1"),
        ({"mem_fraction_static": 1.5}, "--mem-fraction-static must be over 0 and at most 1"),
        ({"max_loaded_loras": 2, "max_loras_per_batch": 3}, "--max-loaded-loras (2) must be at least"),
        ({"max_loaded_loras": 1, "lora_paths": ["a=/a", "b=/b"]}, "names 2 adapters, --max-loaded-loras allows 1"),
        ({"lora_paths": ["a=/a", "a=/b"]}, "the name 'a' is given twice"),
        ({"lora_paths": 5}, "--lora-paths: 5: expected a list"),
        ({"lora_root": 5}, "--lora-root must be a list, is 5"),
        ({"lora_target_modules": ["all", "q_proj"]}, "'all' stands alone"),
        ({"lora_target_modules": []}, "--lora-target-modules: no module given"),
        ({"served_model_name": "a:b"}, "--served-model-name must not contain ':'"),
        ({"model_path": "a:b"}, "--served-model-name must not contain ':'"),
        ({"tp_size": 0}, "--tp-size must be a positive integer"),
        ({"watchdog_timeout": 0}, "--watchdog-timeout must be a positive integer"),
        ({"port": 70000}, "--port must be an integer between 0 and 65535"),
        ({"arena_bytes": "8 apples"}, "--arena-bytes: '8 apples' is not a size"),
        ({"enable_lora": "no"}, "--enable-lora must be true or false"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ConfigError) as error:
        Config.make(**fields)
    assert message in str(error.value)


def test_at_the_limits():
    Config.make(max_loaded_loras=2, max_loras_per_batch=2, lora_paths=["a=/a", "b=/b"], mem_fraction_static=1)
    Config.make(lora_target_modules="all")


def test_travels_to_the_engine_process():
    config = Config.make(lora_paths=["a=/a"], lora_target_modules=["q_proj"], arena_bytes="1G", lora_root="/r")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config


@pytest.mark.parametrize(
    ("name", "table", "others"),
    [
        ("lora_eviction_policy", EVICTION_POLICIES, ()),
        ("lora_backend", LORA_BACKENDS, ("auto",)),
        ("attention_backend", ATTENTION_BACKENDS, ("auto",)),
        ("schedule_policy", POLICIES, ()),
        ("log_level", LEVELS, ()),
    ],
)
def test_choices_are_those_of_the_implementations(name, table, others):
    (opt,) = [opt for opt in options_of(Config) if opt.name == name]
    assert opt.choices == (*others, *table)
    assert opt.default in opt.choices


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_those_of_torch(name):
    assert isinstance(getattr(torch, name), torch.dtype)


@pytest.mark.parametrize(
    "url", ["file:///etc", "s3://", "bucket", "http://h/?q", "http://h/#f", "s3://b::file:///etc", "ftp://h"]
)
def test_a_resolvers_url_is_checked(url):
    with pytest.raises(ConfigError, match="--lora-resolver-url"):
        Config.make(lora_resolver_url=url)


@pytest.mark.parametrize("pattern", ["org", "*/*", "*/name", "org/", "org/a/b", "/x", "org/a b"])
def test_a_resolvers_hub_pattern_names_its_organization(pattern):
    with pytest.raises(ConfigError, match="--lora-resolver-hub"):
        Config.make(lora_resolver_hub=pattern)


@pytest.mark.parametrize("option", ["lora_resolver_dir", "lora_resolver_url", "lora_resolver_hub"])
def test_a_resolver_enables_adapters(option):
    value = {"lora_resolver_dir": "/d", "lora_resolver_url": "https://h", "lora_resolver_hub": "org/*"}[option]
    config = Config.make(**{option: value})
    assert config.enable_lora
    assert config.has_resolver
    assert not Config.make().has_resolver
