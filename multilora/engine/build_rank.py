"""Puts together what every rank of an engine has: its part of the model, the arena, the backends, the runner.

Called by `build.py`, for rank 0, and by `ranks/follow.py`, for the others.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from multilora import demo
from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.device.copier import Copier, DirectCopier
from multilora.adapters.device.ring_copier import RingCopier
from multilora.adapters.packing.blocks import PackTarget
from multilora.attention.backends import choose_attention, make_attention
from multilora.attention.base import AttentionBackend
from multilora.attention.kv_dtypes import largest
from multilora.config import Config
from multilora.distributed.group import SINGLE, Group
from multilora.engine.execution.cuda_graphs import (
    MOST_DECODES,
    MOST_PIECE_ROWS,
    CudaGraphs,
    decode_sizes,
    piece_sizes,
)
from multilora.engine.execution.inputs import PageTables
from multilora.engine.execution.runner import Runner, RunnerLora
from multilora.engine.memory import (
    MakeAttention,
    activation_bytes,
    asking_for,
    graph_bytes,
    list_bytes_per_page,
    measure_step,
)
from multilora.engine.sampling.warmup import warm_up
from multilora.engine.sleep import DeviceSleep, Peers
from multilora.errors import ConfigError
from multilora.lora.backends import make_lora_backend
from multilora.lora.device_table import table_bytes_per_page
from multilora.lora.sites import module_shapes
from multilora.lora.table import LoraTable
from multilora.memory.kv_layout import KVLayout
from multilora.memory.plan import DeviceMemory, MemoryPlan, format_bytes, plan_memory
from multilora.models.base import CausalLM
from multilora.models.load import make_model
from multilora.models.sentence_transformers import embedding_settings
from multilora.params import EmbeddingSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankParts:
    """What a rank has before anything is captured. The arena has the same number of pages on all ranks."""

    device: torch.device
    model: CausalLM
    layout: KVLayout
    arena: torch.Tensor  # uint8 [pages, page_bytes]
    attention: AttentionBackend
    target: PackTarget | None  # None: LoRA is off, as `lora`
    lora: RunnerLora | None
    embedding: EmbeddingSettings


def build_rank(config: Config, group: Group = SINGLE, device: torch.device | None = None) -> RankParts:
    """Load the model and make its arena. Raises ConfigError, ModelUnsupported, OutOfMemory."""
    device = device_of(config) if device is None else device
    model, embedding = _load(config, device, group)
    layout = model.kv_layout(config.page_size)
    over_arena = _attention_maker(config, model, layout)
    arena = _arena(config, model, layout, over_arena)
    attention = over_arena(layout.views(arena))
    target, lora = None, None
    if config.enable_lora:
        target = _pack_target(model, layout)
        lora = _runner_lora(config, model, arena, target)
    return RankParts(device, model, layout, arena, attention, target, lora, embedding)


def make_runner(config: Config, parts: RankParts) -> Runner:
    """The runner, with its CUDA graphs captured. Nothing has run yet."""
    layout = parts.layout
    tables = PageTables(layout.page_size, layout.columns)
    cascade = config.enable_cascade_attention and parts.attention.cascades and layout.columns == 1
    if config.enable_cascade_attention and not cascade:
        logger.warning(
            "--enable-cascade-attention: with the %s attention backend every request of this model reads all of its "
            "pages itself",
            parts.attention.name,
        )
    runner = Runner(parts.model, parts.attention, parts.lora, tables, parts.device, cascade=cascade)
    with asking_for("CUDA graphs", "lower --mem-fraction-static, or start with --disable-cuda-graph"):
        runner.use_graphs(capture(config, parts))
    return runner


def make_sleep(config: Config, parts: RankParts, peers: Peers) -> DeviceSleep:
    """What releases the memory of this rank; its `use_graphs` is to be set once there is a runner."""
    return DeviceSleep(parts.model, parts.arena, partial(fill, config, parts.model), peers)


def recapture(config: Config, parts: RankParts, runner: Runner) -> Callable[[bool], None]:
    """Drops the runner's graphs (False), or captures them again (True)."""
    return lambda wanted: runner.use_graphs(capture(config, parts) if wanted else None)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no CUDA device here")
    return torch.device(name)


def device_of(config: Config, rank: int = 0) -> torch.device:
    """Where a rank computes: each on a GPU of its own, or all on the CPU. On CUDA it becomes the current device."""
    device = choose_device(config.device)
    if device.type == "cpu" or config.tp_size == 1:
        return device
    if (count := torch.cuda.device_count()) < config.tp_size:
        raise ConfigError(f"--tp-size {config.tp_size}: PyTorch sees {count} CUDA devices here")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def model_path(config: Config) -> str:
    return config.model_path or str(demo.base_model_path())


def adapter_limits(config: Config, model: CausalLM) -> AdapterLimits:
    """What adapters may be. Raises ConfigError for --lora-target-modules that the model does not have."""
    targets = config.lora_target_modules
    if targets is None or targets == ("all",):
        return AdapterLimits(config.max_lora_rank)
    known = module_shapes(model.lora_sites())
    names = set(known) | {module.rpartition(".")[2] for module in known}  # "mlp.c_proj" is "c_proj", too
    for target in targets:
        if target not in names:
            raise ConfigError(
                f"--lora-target-modules: {model.config.architecture} has no module {target!r}; it has "
                f"{', '.join(known)}"
            )
    return AdapterLimits(config.max_lora_rank, targets)


def own_copier(config: Config, arena: torch.Tensor) -> Copier:
    """On CUDA copies run beside the steps, unless overlap was turned off; on CPU there is no other stream."""
    if arena.device.type == "cuda" and config.enable_lora_overlap_loading:
        return RingCopier(arena)
    return DirectCopier(arena)


def _load(config: Config, device: torch.device, group: Group) -> tuple[CausalLM, EmbeddingSettings]:
    """The model with its weights, and how its embeddings are made. What it does not serve is refused before any
    weight is fetched."""
    path = model_path(config)
    with asking_for("the weights of the base model", "take a smaller model, or a GPU with more memory"):
        model = make_model(
            path,
            dtype=config.dtype,
            device=device,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            context_length=config.context_length,
            model_impl=config.model_impl,
            quantization=config.quantization,
            kv_cache_dtype=config.kv_cache_dtype,
            group=group,
        )
        adapter_limits(config, model)
        embedding = embedding_settings(path, config.revision, model.config.hidden_size, config.pooling_method)
        fill(config, model)
    return model, embedding


def fill(config: Config, model: CausalLM) -> None:
    """Read the base model's weights into their memory."""
    path, seed = model_path(config), config.random_seed or 0
    model.load(path, load_format=config.load_format, revision=config.revision, seed=seed)


def _arena(config: Config, model: CausalLM, layout: KVLayout, over_arena: MakeAttention) -> torch.Tensor:
    """As planned from what the model leaves; on every rank as the one that has least."""
    plan = _plan(config, model, layout, over_arena)
    pages = model.group.minimum(plan.num_pages)
    logger.info("memory: %s", plan)
    if pages < plan.num_pages:
        logger.info("memory: %d pages, all that the rank with the least memory has room for", pages)
    with asking_for(f"an arena of {format_bytes(plan.arena_bytes)}", "lower --mem-fraction-static or --arena-bytes"):
        return torch.zeros(pages, plan.page_bytes, dtype=torch.uint8, device=model.device)


def _attention_maker(config: Config, model: CausalLM, layout: KVLayout) -> MakeAttention:
    """Makes the attention backend that was chosen, over any arena."""
    shape = replace(model.attention_shape, layer_columns=layout.layer_columns)
    dtypes = model.config.dtype, model.config.kv_dtype
    name = choose_attention(config.attention_backend, model.device, *dtypes, shape)
    if largest(model.config.kv_dtype) is not None:
        shape = replace(shape, kv_scales=model.kv_scales.by_layer)
        logger.info("KV cache: %s, %s", model.config.kv_dtype, model.kv_scales)
    wait = config.attention_backend != "auto"  # asked for by name, it is what computes from the first prompt on
    return lambda kv_views: make_attention(name, kv_views, shape, model.config.dtype, wait=wait)


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
    """Measured by running the largest step, and all that sampling may need."""
    tokens, requests = config.chunked_prefill_size, config.max_running_requests
    with asking_for(f"a step of {tokens} tokens", "lower --chunked-prefill-size or --max-running-requests"):
        step = measure_step(model, layout, over_arena, tokens, requests)
        if model.config.generates:
            warm_up(model.config.vocab_size, model.device)
            torch.cuda.empty_cache()
    row_bytes = model.config.hidden_size * model.config.dtype.itemsize
    sizes, variants = _graph_sizes(config, model.device), 1 + config.enable_lora
    graphs = graph_bytes(sizes, row_bytes, variants)
    if sizes and (pieces := _piece_sizes(config)):
        widest = activation_bytes(model.lora_sites(), model.config.hidden_size, model.config.dtype.itemsize)
        graphs += graph_bytes(pieces, row_bytes, variants, pieces=1 + model.config.num_layers) + widest * pieces[-1]
    tables = list_bytes_per_page(model.attention_shape, model.config.num_layers, max(sizes, default=0))
    if config.enable_lora:
        target = _pack_target(model, layout)
        tables += table_bytes_per_page(target.sites, target.geometry)
    return DeviceMemory(torch.cuda.mem_get_info(model.device)[0], step, graphs, tables)


def _pack_target(model: CausalLM, layout: KVLayout) -> PackTarget:
    """Adapters lie in the pages of the KV cache, in a dtype of their own."""
    return PackTarget.of(model.lora_sites(), model.config.adapter_dtype, layout.page_bytes, model.group.size)


def _runner_lora(config: Config, model: CausalLM, arena: torch.Tensor, target: PackTarget) -> RunnerLora:
    sites = target.sites
    table = LoraTable(arena, target.dtype, tuple(tuple(s.offset for s in site.slices) for site in sites))
    backend = make_lora_backend(
        config.lora_backend, table, sites=sites, dtype=model.config.dtype, chunk_rows=config.max_lora_chunk_size
    )
    return RunnerLora(backend, table, sites, target.layout)


def capture(config: Config, parts: RankParts) -> CudaGraphs | None:
    """CUDA graphs; None where device or attention backend have none. Nothing runs, so page 0 is free to write."""
    model, attention = parts.model, parts.attention
    lora = parts.lora.backend if parts.lora else None
    sizes = _graph_sizes(config, model.device)
    if not sizes:
        return None
    if not model.capturable:
        logger.info("CUDA graphs: none, the experts of this model wait for the device here")
        return None
    twins = {size: twin for size in sizes if (twin := attention.for_graph(size)) is not None}
    pieces = _piece_sizes(config)
    halves = {size: half for size in reversed(pieces) if (half := attention.for_pieces(size)) is not None}
    if not twins or (pieces and not halves):
        logger.info("CUDA graphs: none, the %s attention backend cannot be captured", attention.name)
        return None
    graphs = CudaGraphs(model, twins, halves, lora, model.device)
    graphs.capture()
    return graphs


def _graph_sizes(config: Config, device: torch.device) -> list[int]:
    """Batches whose decode steps are captured; none on CPU."""
    if device.type != "cuda" or config.disable_cuda_graph:
        return []
    return decode_sizes(min(config.cuda_graph_max_bs or MOST_DECODES, config.max_running_requests))


def _piece_sizes(config: Config) -> list[int]:
    """Steps with prompts that are captured."""
    most = config.piecewise_cuda_graph_max_tokens
    tokens = min(MOST_PIECE_ROWS if most is None else most, config.chunked_prefill_size)
    return piece_sizes(tokens, config.max_running_requests)
