"""Puts an engine together: device, model, memory plan, arena, backends, adapter tiers. Called once at start."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic

import torch

from multilora import demo
from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.composition.kv_invariance import leaves_kv
from multilora.adapters.composition.namespaces import Namespaces
from multilora.adapters.device.copier import Copier, DirectCopier
from multilora.adapters.device.residency import Residency
from multilora.adapters.device.ring_copier import RingCopier
from multilora.adapters.host.cache import HostCache
from multilora.adapters.host.spare_memory import spare_memory
from multilora.adapters.host.staging import STAGING_BYTES, Staging
from multilora.adapters.loading.dora_bias import DoraBiasLoader
from multilora.adapters.loading.loader import FetchContext, Loader
from multilora.adapters.loading.process import ProcessLoader
from multilora.adapters.packing.blocks import PackTarget
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.versions.store import AdapterStore
from multilora.attention import choose_attention, make_attention
from multilora.attention.base import AttentionBackend, AttentionShape
from multilora.config import Config
from multilora.engine.engine import Engine
from multilora.engine.execution.cuda_graph import DecodeCudaGraphs, graph_sizes
from multilora.engine.execution.piecewise_cuda_graph import SIZES, PiecewiseCudaGraphs
from multilora.engine.execution.runner import Graphs, Runner, RunnerLora
from multilora.engine.memory import MakeAttention, asking_for, graph_bytes, measure_step
from multilora.engine.messages import Ready, Stats
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.errors import ConfigError
from multilora.lora.backends import make_lora_backend
from multilora.lora.base import LoraBackend
from multilora.lora.device_table import table_bytes_per_page
from multilora.lora.panels import PanelGeometry
from multilora.lora.table import LoraTable
from multilora.memory.kv_layout import KVLayout
from multilora.memory.page_pool import PagePool
from multilora.memory.page_table import KVPages
from multilora.memory.plan import DeviceMemory, MemoryPlan, format_bytes, plan_memory
from multilora.memory.prefix_cache import PrefixCache
from multilora.memory.reclaim import GdsfClock, Reclaimer
from multilora.models.config import ModelConfig
from multilora.models.llama import LlamaForCausalLM
from multilora.models.load import load_model
from multilora.models.weights import checkpoint_files

logger = logging.getLogger(__name__)

STAGING_SHARE = 4  # staging memory takes at most this part of what the host has left; adapters are to lie there too

MakeLoader = Callable[[FetchContext], Loader]
MakeCopier = Callable[[torch.Tensor], Copier]
"""Over an arena."""


@dataclass(frozen=True)
class _Memory:
    """The arena, and who keeps the books of its pages."""

    layout: KVLayout
    arena: torch.Tensor  # uint8 [pages, page_bytes]
    pool: PagePool
    clock: GdsfClock
    prefix: PrefixCache
    namespaces: Namespaces


def build_engine(
    config: Config,
    make_loader: MakeLoader | None = None,
    make_copier: MakeCopier | None = None,
    ahead: int | None = None,
) -> Engine:
    """Load the model and set up everything else. Raises ConfigError, ModelUnsupported, OutOfMemory.

    make_loader: None: a process of its own. make_copier: None: what suits the device. ahead: see Engine; None: 1 on
    CUDA, 0 on CPU, where there is nothing to overlap with.
    """
    started = monotonic()
    device = choose_device(config.device)
    model = _load(config, device)
    over_arena = _attention_maker(config, model.config, device)
    memory = _memory(config, model, over_arena)
    attention = over_arena(memory.layout.views(memory.arena))
    adapters, lora, reclaimer = _lora(config, model, memory, make_loader, make_copier or partial(_copier, config))
    scheduler = _scheduler(config, model.config, memory, reclaimer, adapters)
    backend = lora.backend if lora else None
    with asking_for("CUDA graphs", "lower --mem-fraction-static, or start with --disable-cuda-graph"):
        graphs = _capture(config, model, attention, backend)
    runner = Runner(model, attention, lora, config.page_size, device, graphs)
    logger.info("engine ready in %.1f s on %s, %s", monotonic() - started, device, model.config.dtype)
    return Engine(
        scheduler,
        runner,
        adapters,
        describe=partial(_describe, model.config, device, backend.name if backend else "off", attention.name),
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


def _load(config: Config, device: torch.device) -> LlamaForCausalLM:
    with asking_for("the weights of the base model", "take a smaller model, or a GPU with more memory"):
        model, _ = load_model(
            config.model_path or str(demo.base_model_path()),
            dtype=config.dtype,
            device=device,
            load_format=config.load_format,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            context_length=config.context_length,
            seed=config.random_seed or 0,
        )
    return model


def _memory(config: Config, model: LlamaForCausalLM, over_arena: MakeAttention) -> _Memory:
    """As planned from what the model leaves."""
    layout = model.kv_layout(config.page_size)
    plan = _plan(config, model, layout, over_arena)
    logger.info("memory: %s", plan)
    with asking_for(f"an arena of {format_bytes(plan.arena_bytes)}", "lower --mem-fraction-static or --arena-bytes"):
        arena = torch.zeros(plan.num_pages, plan.page_bytes, dtype=torch.uint8, device=model.device)
    pool, clock = PagePool(plan.num_pages), GdsfClock()
    prefix = PrefixCache(pool, clock, config.page_size, enabled=not config.disable_radix_cache)
    return _Memory(layout, arena, pool, clock, prefix, Namespaces(prefix))


def _scheduler(
    config: Config, model: ModelConfig, memory: _Memory, reclaimer: Reclaimer, adapters: AdapterStore | None
) -> Scheduler:
    return Scheduler(
        KVPages(memory.pool, memory.prefix, reclaimer, memory.arena.shape[1]),
        adapters,
        memory.namespaces,
        eos_token_ids=model.eos_token_ids,
        max_running=config.max_running_requests,
        chunk_tokens=config.chunked_prefill_size,
        policy=config.schedule_policy,
    )


def _capture(
    config: Config, model: LlamaForCausalLM, attention: AttentionBackend, lora: LoraBackend | None
) -> Graphs:
    """Where device and attention backend have them. Nothing runs yet, so page 0 is free to write."""
    sizes = _graph_sizes(config, model.device)
    if not sizes:
        return Graphs()
    twins = {size: twin for size in sizes if (twin := attention.for_graph(size)) is not None}
    halves = {size: half for size in reversed(SIZES) if (half := attention.for_pieces(size)) is not None}
    if not twins or not halves:
        logger.info("CUDA graphs: none, the %s attention backend cannot be captured", attention.name)
        return Graphs()
    decodes, pieces = (
        DecodeCudaGraphs(model, twins, lora, model.device),
        PiecewiseCudaGraphs(model, halves, lora, model.device),
    )
    decodes.capture()
    pieces.capture()
    return Graphs(decodes, pieces)


def _graph_sizes(config: Config, device: torch.device) -> list[int]:
    """Batches whose decode steps are captured; none on CPU."""
    if device.type != "cuda" or config.disable_cuda_graph:
        return []
    return graph_sizes(min(config.cuda_graph_max_bs or 256, config.max_running_requests))


def _attention_maker(config: Config, model: ModelConfig, device: torch.device) -> MakeAttention:
    """Of the backend that was chosen, over any arena."""
    name = choose_attention(config.attention_backend, device, model.dtype, model.head_dim)
    scale = model.head_dim**-0.5
    shape = AttentionShape(model.num_heads, model.num_kv_heads, model.head_dim, scale, model.sliding_window)
    return lambda kv_views: make_attention(name, kv_views, shape)


def _plan(config: Config, model: LlamaForCausalLM, layout: KVLayout, over_arena: MakeAttention) -> MemoryPlan:
    return plan_memory(
        layout,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        context_length=model.config.context_length,
        max_running_requests=config.max_running_requests,
        arena_bytes=config.arena_bytes,
        max_total_tokens=config.max_total_tokens,
        device=_device_memory(config, model, layout, over_arena) if model.device.type == "cuda" else None,
        mem_fraction_static=config.mem_fraction_static,
    )


def _device_memory(
    config: Config, model: LlamaForCausalLM, layout: KVLayout, over_arena: MakeAttention
) -> DeviceMemory:
    """Measured by running the largest step."""
    tokens, requests = config.chunked_prefill_size, config.max_running_requests
    with asking_for(f"a step of {tokens} tokens", "lower --chunked-prefill-size or --max-running-requests"):
        step = measure_step(model, layout, over_arena, tokens, requests)
    row_bytes = model.config.hidden_size * model.config.dtype.itemsize
    sizes, variants = _graph_sizes(config, model.device), 1 + config.enable_lora
    graphs = graph_bytes(sizes, row_bytes, variants)
    if sizes:
        graphs += graph_bytes(SIZES, row_bytes, variants, pieces=1 + model.config.num_layers)
    tables = 0
    if config.enable_lora:
        tables = table_bytes_per_page(model.lora_sites(), PanelGeometry(layout.page_bytes, layout.dtype.itemsize))
    return DeviceMemory(torch.cuda.mem_get_info(model.device)[0], step, graphs, tables)


def _lora(
    config: Config,
    model: LlamaForCausalLM,
    memory: _Memory,
    make_loader: MakeLoader | None,
    make_copier: MakeCopier,
) -> tuple[AdapterStore | None, RunnerLora | None, Reclaimer]:
    """What adapters need, if they are enabled; and who makes room in the arena."""
    if config.enable_lora:
        return _build_lora(config, model, memory, make_loader, make_copier)
    return None, None, Reclaimer(memory.pool, memory.clock, [memory.prefix])


def _build_lora(
    config: Config,
    model: LlamaForCausalLM,
    memory: _Memory,
    make_loader: MakeLoader | None,
    make_copier: MakeCopier,
) -> tuple[AdapterStore, RunnerLora, Reclaimer]:
    layout, arena, pool, clock = memory.layout, memory.arena, memory.pool, memory.clock
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
        make_copier(arena),
        policy=config.lora_eviction_policy,
        max_count=config.max_loras_per_batch,
        max_pages=None if limit is None else limit // layout.page_bytes,
        on_evict=lambda version: store.evicted(version),
    )
    reclaimer = Reclaimer(pool, clock, [memory.prefix, residency])
    targets = None if config.lora_target_modules in (None, ("all",)) else config.lora_target_modules
    base = BaseModel.of(model.config, sites, _weights_dir(config))
    context = FetchContext(base, target, AdapterLimits(config.max_lora_rank, targets), config.lora_root)
    staging = _staging(arena.device) if make_loader is None else None
    loader = make_loader(context) if make_loader is not None else ProcessLoader(context, staging)
    store = AdapterStore(
        DoraBiasLoader(loader, target, model.linear),
        HostCache(config.max_loaded_loras, config.lora_host_bytes),
        residency,
        reclaimer,
        layout_of=target.layout,
        leaves_kv=lambda shape: leaves_kv(shape, sites),
        page_bytes=layout.page_bytes,
        total_pages=pool.total,
        context_pages=layout.pages_for(model.config.context_length),
        on_evict=memory.namespaces.demote,
        settle=staging.settle if staging is not None else lambda entry: None,
    )
    return store, RunnerLora(backend, table, sites), reclaimer


def _staging(device: torch.device) -> Staging | None:
    """Only a GPU copies faster from pinned memory. Without it adapters take a slower way, as the log says then."""
    if device.type != "cuda":
        return None
    spare = spare_memory()
    if spare is not None and spare < STAGING_SHARE * STAGING_BYTES:
        logger.warning("adapters load slower: %s of memory are left, too little to stage them", format_bytes(spare))
        return None
    try:
        staging = Staging()
    except OSError as e:
        logger.warning("adapters load slower: there is no memory to stage them: %s", e)
        return None
    if not staging.pin():
        staging.close()
        return None
    return staging


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
