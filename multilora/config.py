"""The one configuration: frozen, read once from the command line or `LLM(...)`, passed down, never written to.

Field names are the flags' names with underscores; `multilora serve --help` shows the descriptions below.
Sizes that follow from it (arena pages, context length, …) are values that others return, not fields here.
"""

import dataclasses
import difflib
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from multilora import logs
from multilora.config_checks import (
    check_key,
    check_match_windows,
    check_origins,
    check_resolver,
    check_targets,
    check_traces_endpoint,
)
from multilora.errors import ConfigError
from multilora.lora_path import LoraPath, read_lora_paths
from multilora.options import KeysOf, option, options_of, parse_size
from multilora.params import POOLING_METHODS, PoolingMethod

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
"""What models are computed in: names of torch dtypes."""

DEVICES = ("cpu", "cuda")

DTYPE_ALIASES = {"half": "float16", "float": "float32"}


_model = partial(option, group="base model")
_adapters = partial(option, group="adapters")
_memory = partial(option, group="memory and batching")
_server = partial(option, group="server")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set. `None` means: no limit, or chosen by the engine and logged."""

    model_path: str | None = _model(
        None, "local directory, hub id or .gguf file (default: the bundled demo model)", aliases=("--model",)
    )
    tokenizer_path: str | None = _model(None, "local directory or hub id (default: as --model-path)")
    revision: str | None = _model(None, "branch, tag or commit of a hub model")
    trust_remote_code: bool = _model(False, "let the tokenizer's repository run its own code")
    load_format: str = _model("auto", "dummy: random weights, for benchmarks", choices=("auto", "dummy"))
    model_impl: str = _model(
        "auto",
        "whose code computes the model: this package's (native) or transformers'; auto: native where there is one",
        choices=("auto", "native", "transformers"),
    )
    pooling: str | None = _model(
        None,
        "which hidden row is a text's embedding: the last token's, the mean of all, the first's (default: as the "
        "checkpoint's 1_Pooling/config.json says, else last)",
        choices=(KeysOf("multilora.params:POOLING_METHODS"),),
    )
    dtype: str = _model("auto", "auto: the model's own, float32 on CPU", choices=("auto", *DTYPES))
    quantization: str | None = _model(
        None,
        "hold linear layers in 8 or 4 bit, native experts in 8 by fp8; for a checkpoint that is quantised: what by, "
        "which is found anyway",
        choices=(KeysOf("multilora.layers.weights.methods:METHODS"),),
    )
    kv_cache_dtype: str = _model(
        "auto",
        "what keys and values are stored in; auto: --dtype; fp8: fp8_e4m3",
        choices=("auto", KeysOf("multilora.attention.kv_dtypes:KV_DTYPES")),
    )
    device: str = _model("auto", "where the engine computes", choices=("auto", *DEVICES))
    context_length: int | None = _model(None, "longest prompt plus answer, in tokens (default: the model's own)")
    served_model_name: str | None = _model(None, "name clients use for the base model (default: --model-path)")
    chat_template: str | None = _model(None, "file, or the template itself (default: the tokenizer's)")
    tool_call_parser: str | None = _model(
        None,
        "how the model writes tool calls (default: as its chat template teaches, if that is a known format)",
        metavar="NAME",
        choices=(KeysOf("multilora.front.tools.families:FAMILIES"),),
    )
    reasoning_parser: str | None = _model(
        None,
        "how the model marks its thoughts, which then become reasoning_content (default: they stay in the answer)",
        metavar="NAME",
        choices=(KeysOf("multilora.front.tools.reasoning:REASONING"),),
    )
    skip_tokenizer_init: bool = _model(False, "no tokenizer: requests carry input_ids, answers output_ids")

    enable_lora: bool = _adapters(False, "allow adapters (on by itself with --lora-paths or --lora-resolver-…)")
    lora_paths: tuple[LoraPath, ...] = _adapters(
        (), 'adapters to load at start: PATH, NAME=PATH or {"lora_name", "lora_path", "pinned"}', metavar="ADAPTER"
    )
    max_loras_per_batch: int | None = _adapters(
        None, "most adapters in one step; base takes no slot (default: what memory holds)"
    )
    max_loaded_loras: int | None = _adapters(None, "most adapters in host memory (default: no limit)")
    max_lora_rank: int | None = _adapters(None, "refuse adapters of a larger rank (default: any)")
    lora_target_modules: tuple[str, ...] | None = _adapters(
        None, "refuse adapters on other modules; names, or `all` (default: any)", metavar="MODULE"
    )
    lora_eviction_policy: str = _adapters(
        "lru",
        "which idle adapter is evicted first",
        choices=(KeysOf("multilora.adapters.device.eviction:EVICTION_POLICIES"),),
    )
    lora_backend: str = _adapters(
        "auto", "kernels of the LoRA arithmetic", choices=("auto", KeysOf("multilora.lora.backends:BACKENDS"))
    )
    max_lora_chunk_size: int = _adapters(32, "most rows per chunk of the csgmv backend", choices=(16, 32, 64, 128))
    enable_lora_overlap_loading: bool = _adapters(
        True, "copy adapters to a GPU while others compute; off: a copy holds up the step"
    )
    lora_load_mode: str = _adapters(
        "strict",
        "upsert: every load call may replace a loaded adapter, and a missing one is 404; update: and requests that "
        "run go on with the new weights",
        choices=("strict", "upsert", "update"),
    )
    lora_host_bytes: int | None = _adapters(None, "most host memory for adapters", size=True)
    lora_device_bytes: int | None = _adapters(None, "most device memory for adapters", size=True)
    max_loras_per_tenant: int | None = _adapters(
        None, "with --auth-file: most adapters that one tenant has loaded (default: no limit)"
    )
    lora_root: tuple[str, ...] = _adapters(
        (), "adapters must lie inside this directory; can be repeated (default: anywhere)", metavar="DIR"
    )
    lora_resolver_dir: tuple[str, ...] = _adapters(
        (), "an unknown adapter NAME that is asked for is loaded from DIR/NAME; can be repeated", metavar="DIR"
    )
    lora_resolver_url: tuple[str, ...] = _adapters(
        (), "the same from URL/NAME, an http(s)://, s3:// or gs:// URL; can be repeated", metavar="URL"
    )
    lora_resolver_hub: tuple[str, ...] = _adapters(
        (), "the same from hub repositories of such a name, as ORG/*; can be repeated", metavar="ORG/PATTERN"
    )
    max_resolved_loras: int = _adapters(
        256, "most adapters loaded like that; the least recently used one is unloaded"
    )
    lora_resolver_bytes: int = _adapters(
        16 << 30, "most disk space for adapters loaded like that or from a URL", size=True
    )
    lora_resolver_timeout: int = _adapters(30, "seconds that a request waits for such an adapter; beyond it, 503")
    lora_load_timeout: int = _adapters(120, "seconds that loading one adapter may take, download included; then 503")

    lora_spool_bytes: int = _adapters(
        64 << 30, "most disk space for one tenant's adapters from tensors, URLs and copies", size=True
    )

    arena_bytes: int | None = _memory(None, "size of the arena that KV cache and adapters share", size=True)
    max_total_tokens: int | None = _memory(None, "size of the arena, counted in tokens of KV cache")
    mem_fraction_static: float = _memory(0.9, "CUDA: arena's share of what weights and steps leave free")
    page_size: int = _memory(16, "tokens in one page")
    max_running_requests: int = _memory(64, "most requests in one step")
    max_queued_requests: int = _memory(4096, "most requests waiting; beyond it, 503")
    chunked_prefill_size: int = _memory(2048, "most new tokens of prompts in one step")
    disable_radix_cache: bool = _memory(False, "do not share the KV cache of equal prefixes")
    schedule_policy: str = _memory(
        "fair",
        "who starts: the tenant that has received least, who came first, the longest cached prefix, the lowest "
        "`priority`",
        choices=(KeysOf("multilora.engine.scheduling.policy:POLICIES"),),
    )
    fair_input_weight: float = _memory(1.0, "fair: what a computed prompt token counts")
    fair_output_weight: float = _memory(2.0, "fair: what a generated token counts")
    fair_tenant_weight: tuple[str, ...] = _memory(
        (), "fair: share of a tenant, beside 1 for each other; can be repeated", metavar="NAME=WEIGHT"
    )
    max_queued_tokens: int | None = _memory(
        None, "most prompt tokens waiting; beyond it, 503 (default: no limit but that of the requests)"
    )
    max_request_seconds: int | None = _memory(
        None, "longest time for one request, whatever its own `timeout` says (default: no limit)"
    )
    speculative_algorithm: str | None = _memory(
        None,
        "draft tokens, several of which one step verifies; answers stay the same (default: off)",
        choices=(KeysOf("multilora.engine.scheduling.drafters:DRAFTERS"),),
    )
    speculative_num_draft_tokens: int = _memory(8, "most tokens of one draft", high=64)
    speculative_ngram_min_match_window_size: int = _memory(
        3, "ngram: so many of the last tokens must have stood together before", high=64
    )
    speculative_ngram_max_match_window_size: int = _memory(
        12, "ngram: at most so many are compared; the longest match is taken", high=64
    )
    attention_backend: str = _memory(
        "auto", "kernels of the attention", choices=("auto", KeysOf("multilora.attention.backends:BACKENDS"))
    )
    enable_cascade_attention: bool = _memory(False, "read pages that decodes share once for all of them")
    cuda_graph_max_bs: int | None = _memory(None, "largest decode batch captured in a CUDA graph (default: 512)")
    piecewise_cuda_graph_max_tokens: int | None = _memory(
        None,
        "most prompt tokens of a step that is captured, in pieces (default: 2048); 0: no step with prompts",
        low=0,
    )
    disable_cuda_graph: bool = _memory(False, "launch every kernel by itself")
    tp_size: int = _memory(
        1, "GPUs that share the model, or processes on CPU", aliases=("--tp", "--tensor-parallel-size")
    )
    disable_custom_all_reduce: bool = _memory(False, "leave sums and logits of GPUs to NCCL")
    watchdog_timeout: int = _memory(300, "seconds after which a step that hangs ends the engine")
    engine_heartbeat_timeout: int = _memory(
        4, "seconds without a sign of life after which the engine, or a front process, is ended; 0: never", low=0
    )
    max_engine_restarts: int = _memory(
        3, "how often in a row an engine that has ended is started again by itself", low=0
    )
    random_seed: int | None = _memory(None, "seed of requests that bring none", low=None)

    max_connections: int | None = _server(None, "most open connections (default: what file descriptors allow)")
    max_body_bytes: int = _server(32 << 20, "longest body of a request; longer ones get 413", size=True)
    max_response_bytes: int = _server(1 << 30, "most bytes that one request is sent; then it is ended", size=True)
    max_stop_strings: int = _server(64, "most stop strings and stop expressions of a request")
    max_logprobs: int = _server(20, "most alternatives to a token that a request may ask for", low=0)
    grammar_timeout: float = _server(10.0, "most seconds of computing to compile one grammar")
    grammar_max_bytes: int = _server(1 << 30, "most memory to compile one grammar", size=True)
    host: str = _server("127.0.0.1", "address to listen on")
    port: int = _server(30000, "port to listen on; 0: any free one", low=0, high=65535)
    log_level: str = _server("info", "least severe lines shown", choices=tuple(logs.LEVELS))
    log_format: str = _server("text", "form of the lines; json ones name their request", choices=logs.FORMATS)
    api_key: str | None = _server(
        None,
        "clients must send it as a bearer token (or MULTILORA_API_KEY, which other users do not see)",
    )
    api_key_file: str | None = _server(None, "file with the key for --api-key", metavar="FILE")
    admin_api_key: str | None = _server(
        None, "what loading and unloading adapters asks for instead (or MULTILORA_ADMIN_API_KEY)"
    )
    admin_api_key_file: str | None = _server(None, "file with the key for --admin-api-key", metavar="FILE")
    auth_file: str | None = _server(
        None,
        "keys, their tenants and what each may do (docs/security.md); read again on SIGHUP; not with --api-key",
        metavar="FILE",
    )
    metrics_key: str | None = _server(None, "what /metrics asks for, as a bearer token (default: nothing)")
    max_metrics_labels: int = _server(
        64, "most adapters, and most tenants, with numbers of their own in /metrics; the others are summed up"
    )
    otlp_traces_endpoint: str | None = _server(
        None, "send OpenTelemetry traces there, by OTLP over HTTP; needs the extra `otel`", metavar="URL"
    )
    front_workers: int = _server(
        1,
        "processes that serve HTTP and tokenize on the one port; with several, another one holds the registry",
        aliases=("--tokenizer-worker-num", "--api-server-count"),
    )
    drain_seconds: int = _server(25, "how long running requests may still take after SIGTERM", low=0)
    state_dir: str | None = _server(
        None, "where loaded adapters are remembered, for the next start (default: nowhere)", metavar="DIR"
    )
    ssl_certfile: str | None = _server(
        None, "serve HTTPS with this certificate (PEM, with its chain)", metavar="FILE"
    )
    ssl_keyfile: str | None = _server(None, "the certificate's key (default: in --ssl-certfile)", metavar="FILE")
    ssl_keyfile_password: str | None = _server(
        None, "password of --ssl-keyfile (or MULTILORA_SSL_KEYFILE_PASSWORD)", metavar="TEXT"
    )
    ssl_ca_certs: str | None = _server(
        None, "clients must show a certificate that one of these has signed", metavar="FILE"
    )
    profile_dir: str | None = _server(
        None, "where /start_profile writes (default: a directory that goes with the server)", metavar="DIR"
    )
    cors_origins: tuple[str, ...] = _server(
        (), "web pages of these origins may call the server; `*`: all", metavar="ORIGIN"
    )
    logprobs_mode: str = _server(
        "raw",
        "what logprobs of an answer are the log-softmax of: the model's logits, or what tokens are drawn from",
        choices=(KeysOf("multilora.params:LOGPROBS_MODES"),),
    )
    sampling_defaults: str = _server(
        "model",
        "OpenAI routes' defaults: the model's generation_config, or OpenAI's",
        choices=("model", "openai"),
    )

    def __post_init__(self) -> None:
        if (self.lora_paths or self.has_resolver) and not self.enable_lora:
            object.__setattr__(self, "enable_lora", True)
        for opt in options_of(Config):
            opt.check(getattr(self, opt.name))
        self._check_limits()
        self._check_lora_names()
        check_targets(self.lora_target_modules)
        self._check_keys()
        check_origins(self.cors_origins)
        check_traces_endpoint(self.otlp_traces_endpoint)
        check_resolver(self.lora_resolver_url, self.lora_resolver_hub)
        check_match_windows(
            self.speculative_ngram_min_match_window_size, self.speculative_ngram_max_match_window_size
        )
        self._check_fairness()
        if ":" in self.model_name:
            raise ConfigError(f"--served-model-name must not contain ':', is {self.model_name!r}")

    @classmethod
    def make(cls, **fields: Any) -> "Config":
        """Make a config from loose values: lora_paths in any of its forms, lists for tuples, `"8GiB"` for sizes, and
        the names that other servers have for the same thing.

        Raises ConfigError; for an unknown name it names the nearest known one.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ConfigError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        for opt in options_of(cls):
            value = fields.get(opt.name)
            if opt.size and isinstance(value, str):
                fields[opt.name] = _named(opt.flag, value)
            elif opt.type is str and opt.many and isinstance(value, str | list | set):
                fields[opt.name] = (value,) if isinstance(value, str) else tuple(value)
        fields["lora_paths"] = read_lora_paths(fields.get("lora_paths"))
        if isinstance(algorithm := fields.get("speculative_algorithm"), str):
            fields["speculative_algorithm"] = algorithm.lower()  # SGLang writes them in capitals
        if "dtype" in fields:
            fields["dtype"] = DTYPE_ALIASES.get(fields["dtype"], fields["dtype"])
        if fields.get("lora_backend") == "flashinfer":
            logger.warning("--lora-backend flashinfer: its products take adapters of one rank; taking auto")
            fields["lora_backend"] = "auto"
        return cls(**fields)

    @property
    def model_name(self) -> str:
        """The name that clients use for the base model."""
        return self.served_model_name or self.model_path or "multilora-demo"

    @property
    def pooling_method(self) -> PoolingMethod | None:
        """--pooling, if it is given."""
        return next((method for method in POOLING_METHODS if method == self.pooling), None)

    @property
    def has_resolver(self) -> bool:
        """Whether adapters that are asked for by an unknown name are looked for anywhere."""
        return bool(self.lora_resolver_dir or self.lora_resolver_url or self.lora_resolver_hub)

    def _check_limits(self) -> None:
        if not 0 < self.mem_fraction_static <= 1:
            raise ConfigError(f"--mem-fraction-static must be over 0 and at most 1, is {self.mem_fraction_static}")
        loaded, per_batch = self.max_loaded_loras, self.max_loras_per_batch
        if loaded is None:
            return
        if per_batch is not None and loaded < per_batch:
            raise ConfigError(f"--max-loaded-loras ({loaded}) must be at least --max-loras-per-batch ({per_batch})")
        if len(self.lora_paths) > loaded:
            raise ConfigError(
                f"--lora-paths names {len(self.lora_paths)} adapters, --max-loaded-loras allows {loaded}"
            )

    def _check_lora_names(self) -> None:
        seen: set[str] = set()
        for path in self.lora_paths:
            if path.lora_name in seen:
                raise ConfigError(f"--lora-paths: the name {path.lora_name!r} is given twice")
            seen.add(path.lora_name)

    def _check_keys(self) -> None:
        for name in ("api_key", "admin_api_key", "metrics_key"):
            check_key(name, getattr(self, name))
        if self.auth_file is not None and self.api_key is not None:
            raise ConfigError("--auth-file and --api-key: only one of them can be given; a key can go into the file")

    @property
    def tenant_weights(self) -> dict[str, float]:
        """The weights of `--fair-tenant-weight`, by tenant. Raises ConfigError."""
        weights = {}
        for text in self.fair_tenant_weight:
            name, _, value = text.rpartition("=")
            try:
                weights[name] = float(value)
            except ValueError:
                raise ConfigError(f"--fair-tenant-weight: {text!r}: expected NAME=WEIGHT") from None
        return weights

    def _check_fairness(self) -> None:
        named = {f"--fair-tenant-weight {name}": value for name, value in self.tenant_weights.items()}
        named |= {"--fair-input-weight": self.fair_input_weight, "--fair-output-weight": self.fair_output_weight}
        for flag, value in named.items():
            if not 1e-3 <= value <= 1e3:  # which NaN is not either
                raise ConfigError(f"{flag} must be between 0.001 and 1000, is {value}")


def _named(flag: str, text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as e:
        raise ConfigError(f"{flag}: {e}") from None
