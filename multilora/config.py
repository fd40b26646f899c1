"""The one configuration: frozen, read once from the command line or `LLM(...)`, passed down, never written to.

Field names are the flags' names with underscores; `multilora serve --help` shows the same descriptions.
Sizes that follow from it (arena pages, context length, …) are values that others return, not fields here.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from typing import Any, Literal

from multilora.errors import ConfigError


@dataclass(frozen=True)
class LoraPath:
    """One entry of --lora-paths."""

    lora_name: str
    lora_path: str
    pinned: bool = False

    @classmethod
    def parse(cls, value: "str | dict[str, Any] | LoraPath") -> "LoraPath":
        """`PATH`, `NAME=PATH` (split at the first `=`), a JSON object, or a dict. Raises ConfigError."""
        if isinstance(value, LoraPath):
            return value
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as e:
                raise ConfigError(f"--lora-paths: {value!r} is not valid JSON: {e}") from None
        if isinstance(value, str):
            name, eq, path = value.partition("=")
            if not name or (eq and not path):
                raise ConfigError(f"--lora-paths: {value!r}: expected PATH, NAME=PATH or a JSON object")
            return cls(name, path if eq else name)
        if not isinstance(value, dict):
            raise ConfigError(f"--lora-paths: {value!r}: expected PATH, NAME=PATH or a JSON object")
        unknown = set(value) - {"lora_name", "lora_path", "pinned"}
        if unknown:
            raise ConfigError(f"--lora-paths: unknown field {sorted(unknown)[0]!r}")
        fields = (value.get("lora_name"), value.get("lora_path"), value.get("pinned", False))
        if [type(f) for f in fields] != [str, str, bool] or not fields[0]:
            raise ConfigError('--lora-paths: expected {"lora_name": str, "lora_path": str, "pinned": bool}')
        return cls(*fields)


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_BACKENDS = ("auto", "torch", "triton", "csgmv", "flashinfer")
EVICTION_POLICIES = ("lru", "fifo", "cost")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set. `None` means: no limit, or chosen by the engine and logged."""

    # the base model
    model_path: str | None = None  # None: the bundled demo model
    tokenizer_path: str | None = None  # None: as model_path
    revision: str | None = None
    trust_remote_code: bool = False
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the model's, float32 on CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    context_length: int | None = None  # None: the model's own
    served_model_name: str | None = None  # None: model_path
    chat_template: str | None = None  # file, or the template itself
    skip_tokenizer_init: bool = False
    # adapters
    enable_lora: bool = False  # on by itself when lora_paths is given
    lora_paths: tuple[LoraPath, ...] = ()
    max_loras_per_batch: int | None = None
    max_loaded_loras: int | None = None
    max_lora_rank: int | None = None
    lora_target_modules: tuple[str, ...] | None = None
    lora_eviction_policy: str = "lru"
    lora_backend: str = "auto"
    max_lora_chunk_size: int = 16
    enable_lora_overlap_loading: bool = True
    lora_host_bytes: int | None = None
    lora_device_bytes: int | None = None
    lora_root: tuple[str, ...] = ()  # adapters must lie inside one of these when any is set
    # memory and batching
    arena_bytes: int | None = None
    max_total_tokens: int | None = None
    mem_fraction_static: float = 0.9  # CUDA: of what is free once the weights are in
    page_size: int = 16
    max_running_requests: int = 64
    max_queued_requests: int = 4096
    chunked_prefill_size: int = 2048  # new tokens in one step, at most
    disable_radix_cache: bool = False
    schedule_policy: Literal["fcfs", "lpm"] = "fcfs"
    attention_backend: Literal["auto", "flashinfer", "torch"] = "auto"
    cuda_graph_max_bs: int | None = None
    disable_cuda_graph: bool = False
    tp_size: int = 1
    random_seed: int | None = None
    # the server
    host: str = "127.0.0.1"
    port: int = 30000
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    api_key: str | None = None
    admin_api_key: str | None = None
    sampling_defaults: Literal["model", "openai"] = "model"

    def __post_init__(self) -> None:
        if self.lora_paths and not self.enable_lora:
            object.__setattr__(self, "enable_lora", True)
        self._check()

    @classmethod
    def make(cls, **fields: Any) -> "Config":
        """From loose values: unknown names are errors that name the nearest one; lora_paths in any of its forms."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown option {name!r}{hint}")
        paths = fields.get("lora_paths") or ()
        if isinstance(paths, dict):
            paths = [LoraPath(name, path) for name, path in paths.items()]
        elif isinstance(paths, str):
            paths = [paths]
        fields["lora_paths"] = tuple(LoraPath.parse(p) for p in paths)
        if isinstance(fields.get("lora_root"), str):
            fields["lora_root"] = (fields["lora_root"],)
        for name in ("lora_target_modules", "lora_root"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        return cls(**fields)

    def _check(self) -> None:
        def positive(*names: str) -> None:
            for name in names:
                value = getattr(self, name)
                if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                    raise ConfigError(f"--{name.replace('_', '-')} must be a positive integer, is {value!r}")

        def one_of(name: str, allowed: tuple[Any, ...]) -> None:
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"--{name.replace('_', '-')} must be one of {', '.join(map(str, allowed))}, is {value!r}"
                )

        positive("max_loras_per_batch", "max_loaded_loras", "max_lora_rank", "lora_host_bytes", "lora_device_bytes")
        positive("arena_bytes", "max_total_tokens", "page_size", "max_running_requests", "max_queued_requests")
        positive("chunked_prefill_size", "tp_size", "context_length", "cuda_graph_max_bs")
        one_of("load_format", ("auto", "dummy"))
        one_of("dtype", ("auto", "float32", "bfloat16", "float16"))
        one_of("device", ("auto", "cpu", "cuda"))
        one_of("lora_eviction_policy", EVICTION_POLICIES)
        one_of("lora_backend", LORA_BACKENDS)
        one_of("max_lora_chunk_size", (16, 32, 64, 128))
        one_of("schedule_policy", ("fcfs", "lpm"))
        one_of("attention_backend", ("auto", "flashinfer", "torch"))
        one_of("sampling_defaults", ("model", "openai"))
        if not 0 < self.mem_fraction_static <= 1:
            raise ConfigError(f"--mem-fraction-static must be over 0 and at most 1, is {self.mem_fraction_static}")
        if self.max_loaded_loras is not None:
            if self.max_loras_per_batch is not None and self.max_loaded_loras < self.max_loras_per_batch:
                raise ConfigError("--max-loaded-loras must be at least --max-loras-per-batch")
            if len(self.lora_paths) > self.max_loaded_loras:
                raise ConfigError(
                    f"--lora-paths names {len(self.lora_paths)} adapters, --max-loaded-loras allows {self.max_loaded_loras}"
                )
        names = [p.lora_name for p in self.lora_paths]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--lora-paths: the name {name!r} is given twice")
        targets = self.lora_target_modules
        if targets is not None:
            if "all" in targets and len(targets) > 1:
                raise ConfigError("--lora-target-modules: 'all' stands alone")
            for target in targets:
                if target != "all" and target not in LORA_TARGETS:
                    raise ConfigError(
                        f"--lora-target-modules: unknown module {target!r}; known: {', '.join(LORA_TARGETS)}"
                    )
        if ":" in self.model_name:
            raise ConfigError(f"--served-model-name must not contain ':', is {self.model_name!r}")
        if self.tp_size != 1:
            raise ConfigError("--tp-size over 1 is not supported yet")

    @property
    def model_name(self) -> str:
        """The name that clients use for the base model."""
        return self.served_model_name or self.model_path or "multilora-demo"
