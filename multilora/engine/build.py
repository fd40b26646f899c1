"""Puts an engine together: its ranks, and on rank 0 the scheduler and the adapter tiers. Called once at start.

`build_rank.py` makes what every rank has.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic

import torch

from multilora.adapters.composition.kv_invariance import leaves_kv
from multilora.adapters.composition.namespaces import Namespaces
from multilora.adapters.device.copier import Copier
from multilora.adapters.device.packing import compile_packing
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
from multilora.config import Config
from multilora.engine.build_rank import (
    RankParts,
    adapter_limits,
    build_rank,
    choose_device,
    device_of,
    make_runner,
    make_sleep,
    model_path,
    own_copier,
    recapture,
)
from multilora.engine.engine import Engine
from multilora.engine.messages import Ready, Stats
from multilora.engine.ranks.lead import AnyRanks, NoRanks, Ranks, StartRank, start_process
from multilora.engine.scheduling.drafters import DRAFTERS
from multilora.engine.scheduling.fair import FairWeights
from multilora.engine.scheduling.lora_journal import LoraJournal
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.engine.scheduling.speculation import Speculation
from multilora.engine.sleep import DeviceSleep
from multilora.errors import ConfigError
from multilora.memory.page_pool import PagePool
from multilora.memory.page_table import KVPages
from multilora.memory.plan import format_bytes
from multilora.memory.prefix_cache import PrefixCache
from multilora.memory.reclaim import GdsfClock, Reclaimer
from multilora.models.weights import checkpoint_files

__all__ = ["build_engine", "choose_device"]

logger = logging.getLogger(__name__)

STAGING_SHARE = 4  # staging memory takes at most this part of what the host has left; adapters are to lie there too

MakeLoader = Callable[[FetchContext], Loader]
MakeCopier = Callable[[torch.Tensor], Copier]
"""Over an arena."""
Clock = Callable[[], float]


@dataclass(frozen=True)
class _Books:
    """Who keeps the books of the arena's pages."""

    pool: PagePool
    clock: GdsfClock
    prefix: PrefixCache
    namespaces: Namespaces


def build_engine(
    config: Config,
    make_loader: MakeLoader | None = None,
    make_copier: MakeCopier | None = None,
    ahead: int | None = None,
    start_rank: StartRank = start_process,
    *,
    own_process: bool = False,
    clock: Clock = monotonic,
) -> Engine:
    """Load the model and set up everything else. Raises ConfigError, ModelUnsupported, OutOfMemory.

    make_loader: None: a process of its own. make_copier: None: what suits the device. ahead: see Engine; None: 1 on
    CUDA, 0 on CPU, where there is nothing to overlap with. start_rank: starts each rank of --tp-size but the first.
    own_process: the process exists for the engine only, which may end it if it hangs. clock: monotonic seconds, by
    which requests and adapters wait.
    """
    device = device_of(config)
    ranks: AnyRanks = Ranks(config, start_rank, ahead, exits=own_process) if config.tp_size > 1 else NoRanks()
    try:
        return _build(config, device, ranks, make_loader, make_copier or partial(own_copier, config), ahead, clock)
    except BaseException as e:
        error = ranks.failure(e)
        ranks.close()
        if error is e:
            raise
        raise error from e


def _build(
    config: Config,
    device: torch.device,
    ranks: AnyRanks,
    make_loader: MakeLoader | None,
    make_copier: MakeCopier,
    ahead: int | None,
    clock: Clock,
) -> Engine:
    started = monotonic()
    parts = build_rank(config, ranks.join(device), device)
    model = parts.model
    books = _books(config, parts)
    journal = LoraJournal()
    sleep = make_sleep(config, parts, ranks)
    adapters, reclaimer = _adapters(config, parts, books, sleep, journal, make_loader, make_copier, ranks, clock)
    scheduler = _scheduler(config, parts, books, reclaimer, adapters, journal, clock)
    runner = make_runner(config, parts)
    sleep.use_graphs = recapture(config, parts, runner)
    ranks.wait_until_up()
    logger.info("engine ready in %.1f s on %s, %s", monotonic() - started, device, model.config.dtype)
    return Engine(
        scheduler,
        runner,
        adapters,
        ranks,
        describe=partial(_describe, parts),
        max_unfinished=config.max_running_requests + config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        random_seed=config.random_seed,
        ahead=int(device.type == "cuda") if ahead is None else ahead,
        memory=sleep,
    )


def _books(config: Config, parts: RankParts) -> _Books:
    pool, clock = PagePool(parts.arena.shape[0]), GdsfClock()
    enabled, groups = not config.disable_radix_cache, parts.layout.groups
    prefix = PrefixCache(pool, clock, config.page_size, enabled=enabled, groups=groups)
    return _Books(pool, clock, prefix, Namespaces(prefix))


def _scheduler(
    config: Config,
    parts: RankParts,
    books: _Books,
    reclaimer: Reclaimer,
    adapters: AnyStore,
    journal: LoraJournal,
    clock: Clock,
) -> Scheduler:
    return Scheduler(
        KVPages(books.pool, books.prefix, reclaimer, parts.layout.page_bytes, _on_their_way(config)),
        adapters,
        books.namespaces,
        journal,
        eos_token_ids=parts.model.config.eos_token_ids,
        max_running=config.max_running_requests,
        chunk_tokens=config.chunked_prefill_size,
        policy=config.schedule_policy,
        weights=FairWeights(config.fair_input_weight, config.fair_output_weight, config.tenant_weights),
        speculation=_speculation(config, parts),
        clock=clock,
    )


def _speculation(config: Config, parts: RankParts) -> Speculation | None:
    """Raises ConfigError for a model that generates nothing."""
    algorithm = config.speculative_algorithm
    if algorithm is None:
        return None
    if not parts.model.config.generates:
        raise ConfigError(
            f"--speculative-algorithm {algorithm}: {parts.model.config.architecture} generates no text to draft"
        )
    return Speculation(DRAFTERS[algorithm](config), config.speculative_num_draft_tokens)


def _adapters(
    config: Config,
    parts: RankParts,
    books: _Books,
    sleep: DeviceSleep,
    journal: LoraJournal,
    make_loader: MakeLoader | None,
    make_copier: MakeCopier,
    ranks: AnyRanks,
    clock: Clock,
) -> tuple[AnyStore, Reclaimer]:
    """The adapter store, one that refuses if LoRA is off; and who makes room in the arena."""
    if parts.target is None:
        return DisabledStore(), Reclaimer(books.pool, books.clock, [books.prefix])
    limit = config.lora_device_bytes
    device = DeviceTier(
        books.pool,
        books.clock,
        journal,
        ranks.copying(make_copier(parts.arena)),
        policy=config.lora_eviction_policy,
        max_count=config.max_loras_per_batch,
        max_pages=None if limit is None else limit // parts.layout.page_bytes,
        on_evict=books.namespaces.demote,
        now=clock,
    )
    reclaimer = Reclaimer(books.pool, books.clock, [books.prefix, device])
    facts = ranks.facts(parts.model.base_weight)

    def complete(loader: Loader, target: PackTarget) -> Loader:
        return DoraBiasLoader(loader, target, facts, lambda: sleep.has_weights)

    staging = _staging(parts.device) if make_loader is None else None
    beside = staging is not None and config.enable_lora_overlap_loading
    if staging is not None and beside:
        ranks.use_staging(staging)
    base = BaseModel.of(parts.model, _weights_dir(config))
    limits, on_gpu = adapter_limits(config, parts.model), beside and config.tp_size == 1
    context = FetchContext(base, parts.target, limits, config.lora_root, on_gpu)
    if on_gpu:
        compile_packing(parts.arena, parts.target.dtype)
    loader = make_loader(context) if make_loader is not None else ProcessLoader(context, staging)
    return _store(config, parts, context, device, reclaimer, complete(loader, parts.target), staging), reclaimer


def _store(
    config: Config,
    parts: RankParts,
    context: FetchContext,
    device: DeviceTier,
    reclaimer: Reclaimer,
    loader: Loader,
    staging: Staging | None,
) -> AdapterStore:
    layout = parts.layout
    return AdapterStore(
        loader,
        HostTier(config.max_loaded_loras, config.lora_host_bytes),
        device,
        reclaimer,
        layout_of=context.target.layout,
        leaves_kv=lambda shape: leaves_kv(shape, context.base),
        page_bytes=layout.page_bytes,
        ranks=context.target.ranks,
        total_pages=parts.arena.shape[0],
        context_pages=layout.most_pages(parts.model.config.context_length, _on_their_way(config)),
        settle=staging.settle if staging is not None else lambda _entry: None,
    )


def _on_their_way(config: Config) -> int:
    """The most tokens of one request in the steps that have not been read: the one that runs, and the next."""
    return 2 * config.chunked_prefill_size


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
    return str(checkpoint_files(model_path(config), config.revision)[0].parent)


def _describe(parts: RankParts, stats: Stats) -> Ready:
    config = parts.model.config
    return Ready(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        eos_token_ids=list(config.eos_token_ids),
        num_layers=config.num_layers,
        dtype=str(config.dtype).removeprefix("torch."),
        device=parts.device.type,
        lora_backend=parts.lora.backend.name if parts.lora else "off",
        attention_backend=parts.attention.name,
        embedding=parts.embedding,
        classifier=config.classifier,
        generates=config.generates,
        pad_token_id=config.pad_token_id,
        stats=stats,
    )
