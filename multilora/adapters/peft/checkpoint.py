"""Reads an adapter directory as PEFT saved it, and returns typed blocks with every PEFT rule applied.

Everything is checked from headers before the first weight is read. What the config means is in `config.py`, which
files there are in `sources/files.py`, which tensors in `contents.py`, the blocks in `checkpoint_lora.py` and
`checkpoint_full_weights.py`. This file does not know where the directory came from, nor how blocks are packed.
Called by `loading/loader.py`.
"""

import contextlib
from collections.abc import Iterable
from concurrent.futures import wait
from pathlib import Path

from multilora.adapters.adapter import Adapter, AdapterLimits, Block, LowRank, Vector, VectorKind
from multilora.adapters.peft import checkpoint_full_weights as full_weights
from multilora.adapters.peft import checkpoint_lora as lora
from multilora.adapters.peft import experts
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.config import PeftConfig, parse_config
from multilora.adapters.peft.contents import open_tensors, sort_tensors
from multilora.adapters.peft.stored_layout import stored_layout
from multilora.adapters.sources.files import find_files, parse_json_object, read_json, show
from multilora.adapters.sources.fingerprint import fingerprint, identity
from multilora.adapters.thread_pool import ALONE, ReaderPool
from multilora.errors import AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from multilora.lora.sites import SCORE, TABLES

__all__ = ["check_unchanged", "fingerprint", "read_adapter"]


def read_adapter(directory: Path, base: BaseModel, limits: AdapterLimits, readers: ReaderPool = ALONE) -> Adapter:
    """The adapter in `directory`, for the model `base`; read on the threads of `readers`.

    Raises AdapterNotFound, AdapterInvalid, AdapterUnsupported or AdapterIncompatible; the message names the file and
    the field, tensor or module. AdapterError if the base model's own files are gone.
    """
    before = identity(directory)
    files = find_files(directory)
    fields = read_json(files.config)
    config = parse_config(parse_json_object(fields, files.config.name), files.config)
    with contextlib.ExitStack() as stack:
        contents = sort_tensors(open_tensors(files, stack, readers), config, base)
        with_lora = lora.check(contents)
        of_experts = experts.check(contents)
        others = full_weights.plan(contents)
        _check_rank((lora.rank_of(module, contents) for module in with_lora), limits)
        _check_rank((experts.rank_of(module, contents) for module in of_experts), limits)
        targeted = {module.place.module for module in with_lora}
        targeted |= {base.expert_place(module.place).whole.module for module in of_experts}
        _check_modules(targeted | others.modules, base, limits)
        digest = readers.start(lambda: fingerprint(directory, readers))
        stack.callback(lambda: digest.cancel() or wait([digest]))
        merged = {m.place.module: m for m in with_lora if contents.resized and m.place.module in TABLES}
        blocks = [b for m in with_lora if m.place.module not in merged for b in lora.read(m, contents)]
        deltas = {table: lora.table_delta(module, contents) for table, module in merged.items()}
        blocks += experts.read(of_experts, contents)
        blocks += full_weights.read(others, contents, deltas)
        mark = digest.result()
        stored = stored_layout(fields, contents.tensors.opened, blocks)
    _check_modules({block.module for block in blocks}, base, limits)
    _check_activated(blocks, config)
    check_unchanged(directory, before)
    return Adapter(tuple(blocks), mark, config.invocation_tokens, stored)


def check_unchanged(directory: Path, before: str) -> None:
    """before: what `identity` said before the files were read. Raises AdapterInvalid."""
    if identity(directory) != before:
        raise AdapterInvalid(f"{show(str(directory))}: the files changed while they were read; load it again")


def _check_rank(ranks: Iterable[int], limits: AdapterLimits) -> None:
    rank = max(ranks, default=0)
    if limits.max_rank is not None and rank > limits.max_rank:
        raise AdapterIncompatible(
            f"the adapter is incompatible: its rank {rank} is over --max-lora-rank {limits.max_rank}"
        )


def _check_modules(modules: set[str], base: BaseModel, limits: AdapterLimits) -> None:
    """Check --lora-target-modules, to which norms and the classification head do not count. Raises
    AdapterIncompatible."""
    if limits.target_modules is not None:
        allowed = {*limits.target_modules, *base.norm_sizes, SCORE}
        beyond = sorted(m for m in modules if allowed.isdisjoint((m, m.rpartition(".")[2])))
        if beyond:
            raise AdapterIncompatible(
                f"the adapter is incompatible: it targets {', '.join(beyond)}, which --lora-target-modules "
                f"{' '.join(limits.target_modules)} does not allow"
            )


def _check_activated(blocks: list[Block], config: PeftConfig) -> None:
    """With activated LoRA (Greenewald et al. 2025, arXiv:2504.12397), PEFT switches only the low rank on and off:
    anything else would act on all of the prompt. Raises AdapterUnsupported."""
    if config.invocation_tokens is None:
        return
    for block in blocks:
        if not isinstance(block, LowRank) and not (isinstance(block, Vector) and block.kind is VectorKind.LORA_BIAS):
            raise AdapterUnsupported(
                f"{config.file}: activated LoRA (alora_invocation_tokens) with a trained {block.module} beside LoRA "
                "(bias, modules_to_save or trainable_token_indices) is not supported"
            )
