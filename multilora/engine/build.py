"""Puts an engine together: device, model, memory plan, arena, backends, adapter tiers. Called once at start."""

import logging
from collections.abc import Callable
from functools import partial
from time import monotonic

import torch

from multilora import demo
from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.base_model import BaseModel
from multilora.adapters.blocks import PackTarget
from multilora.adapters.copier import Copier, DirectCopier
from multilora.adapters.finish import FinishingLoader
from multilora.adapters.host_cache import HostCache
from multilora.adapters.loader import FetchContext, Loader
from multilora.adapters.loader_process import ProcessLoader
from multilora.adapters.namespaces import Namespaces
from multilora.adapters.residency import Residency
from multilora.adapters.ring_copier import RingCopier
from multilora.adapters.store import AdapterStore
from multilora.attention import make_attention
from multilora.attention.base import AttentionBackend
from multilora.config import Config
from multilora.engine.cuda_graph import DecodeGraphs, graph_sizes
from multilora.engine.engine import Engine
from multilora.engine.messages import Ready, Stats
from multilora.engine.runner import Runner, RunnerLora
from multilora.engine.scheduler import Scheduler
from multilora.errors import ConfigError
from multilora.lora.backends import make_lora_backend
from multilora.lora.base import LoraBackend
from multilora.lora.table import LoraTable
from multilora.memory.kv_layout import KVLayout
from multilora.memory.page_pool import PagePool
from multilora.memory.page_table import KVPages
from multilora.memory.plan import MemoryPlan, plan_memory
from multilora.memory.prefix_cache import PrefixCache
from multilora.memory.reclaim import Clock, Reclaimer
from multilora.models.config import ModelConfig
from multilora.models.llama import LlamaForCausalLM
from multilora.models.load import load_model
from multilora.models.weights import checkpoint_files

logger = logging.getLogger(__name__)

MakeLoader = Callable[[FetchContext], Loader]


def build_engine(config: Config, make_loader: MakeLoader = ProcessLoader, ahead: int | None = None) -> Engine:
    """Load the model and set up everything else. Raises ConfigError, ModelUnsupported, OutOfMemory.

    ahead: see Engine; None: 1 on CUDA, 0 on CPU, where there is nothing to overlap with.
    """
    started = monotonic()
    device = choose_device(config.device)
    model, model_config = load_model(
        config.model_path or str(demo.base_model_path()),
        dtype=config.dtype,
        device=device,
        load_format=config.load_format,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        context_length=config.context_length,
        seed=config.random_seed or 0,
    )
    layout = model.kv_layout(config.page_size)
    plan = _plan(config, model, model_config, layout)
    logger.info("memory: %s", plan)
    arena = torch.zeros(plan.num_pages, plan.page_bytes, dtype=torch.uint8, device=device)
    pool, clock = PagePool(plan.num_pages), Clock()
    prefix = PrefixCache(pool, clock, config.page_size, enabled=not config.disable_radix_cache)
    namespaces = Namespaces(prefix)
    attention = make_attention(
        config.attention_backend,
        kv_views=layout.views(arena),
        num_heads=model_config.num_heads,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        scale=model_config.head_dim**-0.5,
        sliding_window=model_config.sliding_window,
    )
    adapters: AdapterStore | None = None
    lora: RunnerLora | None = None
    if config.enable_lora:
        adapters, lora, reclaimer = _build_lora(
            config, model, layout, arena, pool, clock, prefix, namespaces, make_loader
        )
    else:
        reclaimer = Reclaimer(pool, clock, [prefix])
    backend = lora.backend if lora else None
    scheduler = Scheduler(
        KVPages(pool, prefix, reclaimer, plan.page_bytes),
        adapters,
        namespaces,
        eos_token_ids=model_config.eos_token_ids,
        max_running=config.max_running_requests,
        chunk_tokens=config.chunked_prefill_size,
        policy=config.schedule_policy,
    )
    runner = Runner(model, attention, lora, config.page_size, device, _capture(config, model, attention, backend))
    logger.info("engine ready in %.1f s on %s, %s", monotonic() - started, device, model_config.dtype)
    return Engine(
        scheduler,
        runner,
        adapters,
        describe=partial(_describe, model_config, device, backend.name if backend else "off", attention.name),
        max_queued=config.max_queued_requests,
        random_seed=config.random_seed,
        device=device,
        ahead=int(device.type == "cuda") if ahead is None else ahead,
    )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no CUDA device here")
    return torch.device(name)


def _capture(
    config: Config, model: LlamaForCausalLM, attention: AttentionBackend, lora: LoraBackend | None
) -> DecodeGraphs | None:
    """Decode graphs, where device and attention backend have them. Nothing runs yet, so page 0 is free to write."""
    if model.device.type != "cuda" or config.disable_cuda_graph:
        return None
    largest = min(config.cuda_graph_max_bs or 256, config.max_running_requests)
    found = {size: attention.for_graph(size) for size in graph_sizes(largest)}
    twins = {size: twin for size, twin in found.items() if twin is not None}
    if not twins:
        logger.info("decode graphs: none, the %s attention backend cannot be captured", attention.name)
        return None
    graphs = DecodeGraphs(model, twins, lora, model.device)
    graphs.capture()
    return graphs


def _plan(config: Config, model: LlamaForCausalLM, model_config: ModelConfig, layout: KVLayout) -> MemoryPlan:
    available = None
    if model.device.type == "cuda":
        available = torch.cuda.mem_get_info(model.device)[0]
    return plan_memory(
        layout,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        context_length=model_config.context_length,
        max_running_requests=config.max_running_requests,
        arena_bytes=config.arena_bytes,
        max_total_tokens=config.max_total_tokens,
        available_bytes=available,
        mem_fraction_static=config.mem_fraction_static,
    )


def _build_lora(
    config: Config,
    model: LlamaForCausalLM,
    layout: KVLayout,
    arena: torch.Tensor,
    pool: PagePool,
    clock: Clock,
    prefix: PrefixCache,
    namespaces: Namespaces,
    make_loader: MakeLoader,
) -> tuple[AdapterStore, RunnerLora, Reclaimer]:
    sites = model.lora_sites()
    target = PackTarget(sites, layout.dtype, layout.page_bytes)
    table = LoraTable(arena, layout.dtype, tuple(tuple(s.offset for s in site.slices) for site in sites))
    backend = make_lora_backend(
        config.lora_backend, table, arena.device, sites=sites, chunk_rows=config.max_lora_chunk_size
    )
    limit = config.lora_device_bytes
    residency = Residency(
        pool,
        clock,
        table,
        _copier(config, arena),
        policy=config.lora_eviction_policy,
        max_count=config.max_loras_per_batch,
        max_pages=None if limit is None else limit // layout.page_bytes,
        on_evict=lambda version: store.evicted(version),
    )
    reclaimer = Reclaimer(pool, clock, [prefix, residency])
    targets = None if config.lora_target_modules in (None, ("all",)) else config.lora_target_modules
    base = BaseModel.of(model.config, sites, _weights_dir(config))
    context = FetchContext(base, target, AdapterLimits(config.max_lora_rank, targets), config.lora_root)
    store = AdapterStore(
        FinishingLoader(make_loader(context), target, model.linear),
        HostCache(config.max_loaded_loras, config.lora_host_bytes),
        residency,
        reclaimer,
        layout_of=target.layout,
        page_bytes=layout.page_bytes,
        total_pages=pool.total,
        context_pages=layout.pages_for(model.config.context_length),
        on_evict=namespaces.devalue,
    )
    return store, RunnerLora(backend, table, sites), reclaimer


def _weights_dir(config: Config) -> str | None:
    """Where the base model's own weights lie, by now on this machine."""
    if config.load_format == "dummy":
        return None
    path = config.model_path or str(demo.base_model_path())
    return str(checkpoint_files(path, config.revision)[0].parent)


def _copier(config: Config, arena: torch.Tensor) -> Copier:
    """On CUDA copies run beside the steps, unless overlap was turned off; on CPU there is no other stream."""
    if arena.device.type == "cuda" and config.enable_lora_overlap_loading:
        return RingCopier(arena)
    return DirectCopier(arena)


def _describe(config: ModelConfig, device: torch.device, lora: str, attention: str, stats: Stats) -> Ready:
    return Ready(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        eos_token_ids=list(config.eos_token_ids),
        num_layers=config.num_layers,
        dtype=str(config.dtype).removeprefix("torch."),
        device=str(device),
        lora_backend=lora,
        attention_backend=attention,
        stats=stats,
    )
