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
from multilora.adapters.device.ring_copier import RingCopier
from multilora.adapters.host.spare_memory import spare_memory
from multilora.adapters.host.staging import STAGING_BYTES, Staging
from multilora.adapters.lifecycle.device_tier import DeviceTier
from multilora.adapters.lifecycle.disabled import AnyStore, DisabledStore
from multilora.adapters.lifecycle.host_tier import HostTier
from multilora.adapters.lifecycle.store import AdapterStore
from multilora.adapters.loading.dora_bias import DoraBiasLoader
from multilora.adapters.loading.loader import FetchContext, Loader
from multilora.adapters.loading.process import ProcessLoader
from multilora.adapters.packing.blocks import PackTarget
from multilora.adapters.peft.base_model import BaseModel
from multilora.attention.backends import choose_attention, make_attention
from multilora.attention.base import AttentionBackend
from multilora.config import Config
from multilora.engine.engine import Engine
from multilora.engine.execution.cuda_graphs import PIECE_SIZES, CudaGraphs, decode_sizes
from multilora.engine.execution.runner import Runner, RunnerLora
from multilora.engine.memory import MakeAttention, asking_for, graph_bytes, measure_step
from multilora.engine.messages import Ready, Stats
from multilora.engine.scheduling.lora_journal import LoraJournal
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.engine.sleep import DeviceSleep
from multilora.errors import ConfigError
from multilora.lora.backends import make_lora_backend
from multilora.lora.base import LoraBackend
from multilora.lora.device_table import table_bytes_per_page
from multilora.lora.sites import module_shapes
from multilora.lora.table import LoraTable
from multilora.memory.kv_layout import KVLayout
from multilora.memory.page_pool import PagePool
from multilora.memory.page_table import KVPages
from multilora.memory.plan import DeviceMemory, MemoryPlan, format_bytes, plan_memory
from multilora.memory.prefix_cache import PrefixCache
from multilora.memory.reclaim import GdsfClock, Reclaimer
from multilora.models.base import CausalLM
from multilora.models.config import ModelConfig
from multilora.models.load import make_model
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
    over_arena = _attention_maker(config, model)
    memory = _memory(config, model, over_arena)
    attention = over_arena(memory.layout.views(memory.arena))
    sleep = DeviceSleep(model, memory.arena, partial(_fill, config, model))
    journal = LoraJournal()
    adapters, lora, reclaimer = _lora(
        config, model, memory, sleep, journal, make_loader, make_copier or partial(_copier, config)
    )
    scheduler = _scheduler(config, model.config, memory, reclaimer, adapters, journal)
    backend = lora.backend if lora else None
    capture = partial(_capture, config, model, attention, backend)
    runner = Runner(model, attention, lora, config.page_size, device)
    with asking_for("CUDA graphs", "lower --mem-fraction-static, or start with --disable-cuda-graph"):
        runner.use_graphs(capture())
    sleep.use_graphs = lambda wanted: runner.use_graphs(capture() if wanted else None)
    logger.info("engine ready in %.1f s on %s, %s", monotonic() - started, device, model.config.dtype)
    return Engine(
        scheduler,
        runner,
        adapters,
        describe=partial(_describe, model.config, device, backend.name if backend else "off", attention.name),
        max_unfinished=config.max_running_requests + config.max_queued_requests,
        random_seed=config.random_seed,
        ahead=int(device.type == "cuda") if ahead is None else ahead,
        memory=sleep,
    )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no CUDA device here")
    return torch.device(name)


def _load(config: Config, device: torch.device) -> CausalLM:
    """The model with its weights. What it does not serve is refused before any weight is fetched."""
    path = _model_path(config)
    with asking_for("the weights of the base model", "take a smaller model, or a GPU with more memory"):
        model = make_model(
            path,
            dtype=config.dtype,
            device=device,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            context_length=config.context_length,
        )
        _adapter_limits(config, model)
        _fill(config, model)
    return model


def _fill(config: Config, model: CausalLM) -> None:
    """Read the base model's weights into their memory."""
    path, seed = _model_path(config), config.random_seed or 0
    model.load(path, load_format=config.load_format, revision=config.revision, seed=seed)


def _model_path(config: Config) -> str:
    return config.model_path or str(demo.base_model_path())


def _adapter_limits(config: Config, model: CausalLM) -> AdapterLimits:
    """What adapters may be. Raises ConfigError for --lora-target-modules that the model does not have."""
    targets = config.lora_target_modules
    if targets is None or targets == ("all",):
        return AdapterLimits(config.max_lora_rank)
    known = module_shapes(model.lora_sites())
    for target in targets:
        if target not in known:
            raise ConfigError(
                f"--lora-target-modules: {model.config.architecture} has no module {target!r}; it has "
                f"{', '.join(known)}"
            )
    return AdapterLimits(config.max_lora_rank, targets)


def _memory(config: Config, model: CausalLM, over_arena: MakeAttention) -> _Memory:
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
    config: Config,
    model: ModelConfig,
    memory: _Memory,
    reclaimer: Reclaimer,
    adapters: AnyStore,
    journal: LoraJournal,
) -> Scheduler:
    return Scheduler(
        KVPages(memory.pool, memory.prefix, reclaimer, memory.arena.shape[1]),
        adapters,
        memory.namespaces,
        journal,
        eos_token_ids=model.eos_token_ids,
        max_running=config.max_running_requests,
        chunk_tokens=config.chunked_prefill_size,
        policy=config.schedule_policy,
    )


def _capture(
    config: Config, model: CausalLM, attention: AttentionBackend, lora: LoraBackend | None
) -> CudaGraphs | None:
    """None where device or attention backend have none. Nothing runs yet, so page 0 is free to write."""
    sizes = _graph_sizes(config, model.device)
    if not sizes:
        return None
    twins = {size: twin for size in sizes if (twin := attention.for_graph(size)) is not None}
    halves = {size: half for size in reversed(PIECE_SIZES) if (half := attention.for_pieces(size)) is not None}
    if not twins or not halves:
        logger.info("CUDA graphs: none, the %s attention backend cannot be captured", attention.name)
        return None
    graphs = CudaGraphs(model, twins, halves, lora, model.device)
    graphs.capture()
    return graphs


def _graph_sizes(config: Config, device: torch.device) -> list[int]:
    """Batches whose decode steps are captured; none on CPU."""
    if device.type != "cuda" or config.disable_cuda_graph:
        return []
    return decode_sizes(min(config.cuda_graph_max_bs or 256, config.max_running_requests))


def _attention_maker(config: Config, model: CausalLM) -> MakeAttention:
    """Makes the attention backend that was chosen, over any arena."""
    shape, dtypes = model.attention_shape, (model.config.dtype, model.config.kv_dtype)
    name = choose_attention(config.attention_backend, model.device, *dtypes, shape.head_dim)
    return lambda kv_views: make_attention(name, kv_views, shape)


def _plan(config: Config, model: CausalLM, layout: KVLayout, over_arena: MakeAttention) -> MemoryPlan:
    return plan_memory(
        layout,
        weight_bytes=model.weight_bytes,
        context_length=model.config.context_length,
        max_running_requests=config.max_running_requests,
        arena_bytes=config.arena_bytes,
        max_total_tokens=config.max_total_tokens,
        device=_device_memory(config, model, layout, over_arena) if model.device.type == "cuda" else None,
        mem_fraction_static=config.mem_fraction_static,
    )


def _device_memory(config: Config, model: CausalLM, layout: KVLayout, over_arena: MakeAttention) -> DeviceMemory:
    """Measured by running the largest step."""
    tokens, requests = config.chunked_prefill_size, config.max_running_requests
    with asking_for(f"a step of {tokens} tokens", "lower --chunked-prefill-size or --max-running-requests"):
        step = measure_step(model, layout, over_arena, tokens, requests)
    row_bytes = model.config.hidden_size * model.config.dtype.itemsize
    sizes, variants = _graph_sizes(config, model.device), 1 + config.enable_lora
    graphs = graph_bytes(sizes, row_bytes, variants)
    if sizes:
        graphs += graph_bytes(PIECE_SIZES, row_bytes, variants, pieces=1 + model.config.num_layers)
    tables = 0
    if config.enable_lora:
        target = _pack_target(model, layout)
        tables = table_bytes_per_page(target.sites, target.geometry)
    return DeviceMemory(torch.cuda.mem_get_info(model.device)[0], step, graphs, tables)


def _lora(
    config: Config,
    model: CausalLM,
    memory: _Memory,
    sleep: DeviceSleep,
    journal: LoraJournal,
    make_loader: MakeLoader | None,
    make_copier: MakeCopier,
) -> tuple[AnyStore, RunnerLora | None, Reclaimer]:
    """What adapters need, if they are enabled; and who makes room in the arena."""
    if config.enable_lora:
        return _build_lora(config, model, memory, sleep, journal, make_loader, make_copier)
    return DisabledStore(), None, Reclaimer(memory.pool, memory.clock, [memory.prefix])


def _build_lora(
    config: Config,
    model: CausalLM,
    memory: _Memory,
    sleep: DeviceSleep,
    journal: LoraJournal,
    make_loader: MakeLoader | None,
    make_copier: MakeCopier,
) -> tuple[AdapterStore, RunnerLora, Reclaimer]:
    layout, arena, pool, clock = memory.layout, memory.arena, memory.pool, memory.clock
    target = _pack_target(model, layout)
    sites = target.sites
    table = LoraTable(arena, target.dtype, tuple(tuple(s.offset for s in site.slices) for site in sites))
    backend = make_lora_backend(
        config.lora_backend, table, sites=sites, dtype=model.config.dtype, chunk_rows=config.max_lora_chunk_size
    )
    limit = config.lora_device_bytes
    device = DeviceTier(
        pool,
        clock,
        journal,
        make_copier(arena),
        policy=config.lora_eviction_policy,
        max_count=config.max_loras_per_batch,
        max_pages=None if limit is None else limit // layout.page_bytes,
        on_evict=memory.namespaces.demote,
    )
    reclaimer = Reclaimer(pool, clock, [memory.prefix, device])
    base = BaseModel.of(model, _weights_dir(config))
    context = FetchContext(base, target, _adapter_limits(config, model), config.lora_root)
    staging = _staging(arena.device) if make_loader is None else None
    loader = make_loader(context) if make_loader is not None else ProcessLoader(context, staging)
    store = AdapterStore(
        DoraBiasLoader(loader, target, model.base_weight, lambda: sleep.has_weights),
        HostTier(config.max_loaded_loras, config.lora_host_bytes),
        device,
        reclaimer,
        layout_of=target.layout,
        leaves_kv=lambda shape: leaves_kv(shape, base),
        page_bytes=layout.page_bytes,
        total_pages=pool.total,
        context_pages=layout.pages_for(model.config.context_length),
        settle=staging.settle if staging is not None else lambda _entry: None,
    )
    return store, RunnerLora(backend, table, sites, target.layout), reclaimer


def _pack_target(model: CausalLM, layout: KVLayout) -> PackTarget:
    """Adapters lie in the pages of the KV cache, in a dtype of their own."""
    return PackTarget(model.lora_sites(), model.config.adapter_dtype, layout.page_bytes)


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
    return str(checkpoint_files(_model_path(config), config.revision)[0].parent)


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
