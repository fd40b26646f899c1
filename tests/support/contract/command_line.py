"""The command line: flags as SGLang's users type them, with their defaults."""

import logging
from dataclasses import asdict
from typing import Any

import pytest

from multilora.cli import parser as cli
from multilora.cli.compat import IGNORED
from multilora.config import Config
from multilora.errors import ConfigError
from multilora.lora_path import LoraPath

from .table import Section
from .world import BASE, PATHS, TEXT, TOO_LARGE, few

line = Section("flags", "Command line")


def config(text: str = "") -> Config:
    arguments = cli.parse(["serve", *text.split()])
    assert isinstance(arguments, cli.ServeArgs)
    return arguments.config()


def refused(text: str, *words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(text)
    assert all(word in str(error.value) for word in words), error.value


def defaults(**expected: Any) -> None:
    assert {name: getattr(config(), name) for name in expected} == expected


def taken(flags: dict[str, tuple[str, Any]]) -> None:
    """Flag → what is typed, and what the option named like it then holds."""
    for flag, (typed, value) in flags.items():
        assert asdict(config(f"{flag} {typed}"))[flag[2:].replace("-", "_")] == value, flag


@line
def model_path(server):
    """`--model-path` is a directory or a hub id; without it the bundled demo model is served."""
    taken({"--model-path": ("org/name", "org/name")})
    assert server.get("/v1/models").json()["data"][0]["id"] == BASE


@line
def enable_lora():
    """`--enable-lora` is off, and on by itself with `--lora-paths`."""
    defaults(enable_lora=False)
    assert config("--enable-lora").enable_lora
    assert config("--lora-paths a=/a").enable_lora


@line
def lora_paths(server):
    """`--lora-paths` takes any number of `PATH`, `NAME=PATH` (split at the first `=`) and JSON objects, mixed."""
    spoken = '--lora-paths /x/a b=/x=y {"lora_name":"c","lora_path":"/c","pinned":true}'
    assert config(spoken).lora_paths == (LoraPath("/x/a", "/x/a"), LoraPath("b", "/x=y"), LoraPath("c", "/c", True))
    assert server.loaded_adapters() == {"pirate": PATHS["pirate"], "sql": PATHS["sql"]}


@line
def max_loras_per_batch(server):
    """`--max-loras-per-batch` has no default, is positive, and the base model takes no place in it."""
    defaults(max_loras_per_batch=None)
    refused("--max-loras-per-batch 0", "--max-loras-per-batch", "0")
    assert server.get("/server_info").json()["max_loras_per_batch"] == 2
    both_and_base = server.native(text=[TEXT] * 3, lora_path=["pirate", "sql", None])
    assert [item["meta_info"]["lora_version"] for item in both_and_base] == [1, 2, None]


@line
def max_loaded_loras():
    """`--max-loaded-loras` is at least `--max-loras-per-batch`, and more paths than that are an error at start."""
    defaults(max_loaded_loras=None)
    refused("--max-loaded-loras 2 --max-loras-per-batch 3", "--max-loaded-loras (2)", "--max-loras-per-batch (3)")
    refused("--max-loaded-loras 1 --lora-paths a=/a b=/b", "--lora-paths names 2 adapters", "allows 1")


@line
def lora_eviction_policy():
    """`--lora-eviction-policy` is `lru`; `fifo` is there too, and others are refused by name."""
    defaults(lora_eviction_policy="lru")
    taken({"--lora-eviction-policy": ("fifo", "fifo")})
    refused("--lora-eviction-policy mru", "--lora-eviction-policy", "'mru'")


@line
def lora_backend(caplog):
    """`--lora-backend` is `auto`; `triton`, `csgmv`, `torch` exist, and `flashinfer` is `auto` with a warning."""
    defaults(lora_backend="auto")
    for name in ("auto", "triton", "csgmv", "torch"):
        taken({"--lora-backend": (name, name)})
    assert not caplog.records
    taken({"--lora-backend": ("flashinfer", "auto")})
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


@line
def max_lora_rank(server):
    """`--max-lora-rank` is not needed; set, a larger adapter is 400 and the message has both numbers."""
    defaults(max_lora_rank=None)
    body = {"lora_name": "large", "lora_path": TOO_LARGE}
    server.failed("/load_lora_adapter", body, "incompatible", "64", "--max-lora-rank", "32")


@line
def lora_target_modules():
    """`--lora-target-modules` is not needed; it takes names, or `all` alone."""
    defaults(lora_target_modules=None)
    assert config("--lora-target-modules q_proj v_proj").lora_target_modules == ("q_proj", "v_proj")
    assert config("--lora-target-modules all").lora_target_modules == ("all",)
    refused("--lora-target-modules all q_proj", "all")


line.elsewhere(
    "adapters-of-other-modules",
    'An adapter of modules that `--lora-target-modules` does not allow is "incompatible".',
    "tests/adapters/peft/test_checkpoint.py::test_limits",
)


@line
def sizes_of_chunks():
    """`--max-lora-chunk-size` is one of 16, 32, 64 and 128."""
    for size in (16, 32, 64, 128):
        taken({"--max-lora-chunk-size": (str(size), size)})
    refused("--max-lora-chunk-size 48", "--max-lora-chunk-size", "48")


@line.deviates
def max_lora_chunk_size():
    """`--max-lora-chunk-size` is 16 when not given."""
    defaults(max_lora_chunk_size=32)


@line
def overlap_loading():
    """`--enable-lora-overlap-loading` is on, and does not bound `--max-loaded-loras`."""
    defaults(enable_lora_overlap_loading=True)
    assert config("--enable-lora-overlap-loading --max-loras-per-batch 2 --max-loaded-loras 9").max_loaded_loras == 9
    assert not config("--no-enable-lora-overlap-loading").enable_lora_overlap_loading


@line
def own_flags():
    """Memory, roots, device and attention have flags of ours, none or `auto` when not given."""
    defaults(lora_host_bytes=None, lora_device_bytes=None, arena_bytes=None, max_total_tokens=None, lora_root=())
    defaults(device="auto", attention_backend="auto")
    sizes = ("--lora-host-bytes", "--lora-device-bytes", "--arena-bytes")
    taken(dict.fromkeys(sizes, ("8GiB", 8 << 30)) | {"--max-total-tokens": ("99", 99), "--page-size": ("8", 8)})
    assert config("--lora-root /a --lora-root /b").lora_root == ("/a", "/b")
    for flag, names in {"--device": "auto cpu cuda", "--attention-backend": "auto flashinfer torch"}.items():
        for name in names.split():
            taken({flag: (name, name)})


@line
def flags_as_sglang():
    """The flags that SGLang's users type most are taken, with SGLang's meaning."""
    words = {
        "--tp-size": "2",
        "--cuda-graph-max-bs": "8",
        "--max-running-requests": "5",
        "--chunked-prefill-size": "512",
        "--context-length": "100",
        "--port": "8000",
        "--random-seed": "7",
        "--max-queued-requests": "9",
    }
    taken({flag: (value, int(value)) for flag, value in words.items()})
    words = {
        "--dtype": "bfloat16",
        "--load-format": "dummy",
        "--served-model-name": "m",
        "--host": "0.0.0.0",
        "--log-level": "warning",
        "--api-key": "k",
        "--admin-api-key": "a",
        "--tokenizer-path": "/t",
        "--revision": "r",
        "--chat-template": "/c",
        "--schedule-policy": "lpm",
        "--tool-call-parser": "qwen25",
        "--reasoning-parser": "qwen3",
    }
    taken({flag: (value, value) for flag, value in words.items()})
    taken({"--mem-fraction-static": ("0.5", 0.5), "--dtype": ("half", "float16")})
    for flag in ("--disable-radix-cache", "--skip-tokenizer-init", "--trust-remote-code", "--disable-cuda-graph"):
        taken({flag: ("", True)})


@line
def defaults_as_sglang():
    """What these flags are when not given is SGLang's, where SGLang has one value for every machine."""
    defaults(tp_size=1, disable_radix_cache=False, context_length=None, dtype="auto", load_format="auto")
    defaults(host="127.0.0.1", port=30000, log_level="info", api_key=None, admin_api_key=None, random_seed=None)
    defaults(skip_tokenizer_init=False, tokenizer_path=None, revision=None, trust_remote_code=False)
    defaults(served_model_name=None, chat_template=None, disable_cuda_graph=False)


@line.deviates
def sizes_chosen_by_the_gpu():
    """`--mem-fraction-static`, `--max-running-requests` and `--chunked-prefill-size` follow the GPU."""
    defaults(mem_fraction_static=0.9, max_running_requests=64, chunked_prefill_size=2048)


@line.deviates
def chunked_prefill_off():
    """`--chunked-prefill-size -1` computes every prompt in one step."""
    refused("--chunked-prefill-size -1", "--chunked-prefill-size", "-1")


@line.deviates
def schedule_policy():
    """`--schedule-policy` is `fcfs` when not given."""
    defaults(schedule_policy="fair")
    taken({"--schedule-policy": ("fcfs", "fcfs")})


@line.deviates
def schedule_policies():
    """`--schedule-policy` has `lof`, `random`, `dfs-weight` and `routing-key` too."""
    for name in ("lof", "random", "dfs-weight", "routing-key"):
        refused(f"--schedule-policy {name}", "--schedule-policy", "fair, fcfs, lpm, priority", name)


@line
def metrics_are_always_on(server, caplog):
    """`--enable-metrics` is accepted without a warning: metrics are always on."""
    assert config("--enable-metrics") == Config()
    assert not caplog.records
    assert server.get("/metrics").text


@line
def aliases():
    """`--model` is `--model-path`; `--tp` and `--tensor-parallel-size` are `--tp-size`."""
    assert config("--model m --tp 2") == config("--model-path m --tensor-parallel-size 2")


@line
def known_flags_without_effect(caplog):
    """A flag that SGLang has and this server does not need is accepted with one warning line."""
    assert config("--schedule-conservativeness 0.3 --schedule-conservativeness 0.4") == Config()
    assert [r.getMessage() for r in caplog.records] == [
        "--schedule-conservativeness has no effect here and is ignored"
    ]
    assert len(IGNORED) > 400


@line.deviates
def configuration_files():
    """`--config` reads a file of flags."""
    refused("--config x.yaml", "--config")


@line
def unknown_flags():
    """An unknown flag is an error that names the nearest one."""
    refused("--max-loras-per-bach 4", "--max-loras-per-bach", "did you mean --max-loras-per-batch?")
    refused("--schedule-conservativnes 1", "did you mean --schedule-conservativeness?")


@line
def served_model_names():
    """A served model name with `:` is refused at start."""
    refused("--served-model-name a:b", "--served-model-name", "'a:b'")


@line
def adapters_in_rounds(server):
    """A request that names more adapters than `--max-loras-per-batch` is served, in rounds."""
    with server.loaded("third"):
        found = server.native(few(max_new_tokens=1), text=[TEXT] * 4, lora_path=["pirate", "sql", "third", None])
        versions = [item["meta_info"]["lora_version"] for item in found]
        assert versions[:2] + versions[3:] == [1, 2, None]
        assert versions[2] > 2
        assert set(server.loaded_adapters()) == {"pirate", "sql", "third"}, "what was evicted is not listed"
