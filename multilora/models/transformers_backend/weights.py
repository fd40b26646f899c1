"""Fills a tree of transformers from safetensors, under the names that the checkpoint has.

transformers knows how the names of a family's checkpoints differ from its modules', and which tensors become one
(the experts of a layer) or several. Those rules are its own and are asked here; reading, checking and copying are
ours, one tensor at a time, and of each the part that this rank holds.
"""

import contextlib
import copy
import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from multilora.errors import ModelUnsupported
from multilora.layers.weights.mxfp4 import BLOCK, check_blocks, dequantised
from multilora.models.transformers_backend.parameters import HeldParameter
from multilora.models.transformers_backend.tree_experts import fill_laid_out
from multilora.models.weights import (
    SUPERFLUOUS,
    Destination,
    check_filled,
    check_tensor,
    checkpoint_files,
    destinations,
    open_file,
    some,
    take,
)

logger = logging.getLogger(__name__)

IN_BLOCKS = re.compile(r"(.+)_(blocks|scales)")
"""The names of what holds a parameter in 4 bits."""


@dataclass
class _Merge:
    """Tensors of a checkpoint that become others together. tensors: pattern, file and name of each, in order."""

    converter: WeightConverter
    tensors: list[tuple[str, Path, str]] = field(default_factory=list)


@dataclass
class _Plan:
    direct: dict[Path, list[tuple[str, str]]]  # the tensor's name there, and in the tree
    merges: dict[str, _Merge]  # by the first name that they get
    blocks: dict[str, dict[str, tuple[Path, str]]]  # by the name in the tree: file and name of "blocks" and "scales"


def load_tree(
    lm: Any, model_path: str, revision: str | None, others: Mapping[str, Destination] | None = None
) -> None:
    """Fill every parameter, and every buffer that checkpoints hold. others: see `load_weights`.

    Raises ModelUnsupported naming the tensor that is missing, left over or misshapen, ConfigError for a missing or
    broken file.
    """
    began = time.monotonic()
    files = checkpoint_files(model_path, revision)
    targets = tree_destinations(lm) | dict(others or {})
    plan = _plan(lm, files, targets)
    filled: set[str] = set()
    with tqdm(total=len(targets), unit=" tensors", desc="Loading weights") as bar:
        for name, tensor in _tensors(lm, plan, targets):
            targets[name].load(tensor)
            filled.add(name)
            bar.update()
    if left := set(targets) - filled - _optional(lm, targets):
        raise ModelUnsupported(f"the checkpoint lacks {some(left)}")
    check_filled(lm)
    logger.info("weights: %d tensors in %.1f s from %d file(s)", len(filled), time.monotonic() - began, len(files))


def tree_destinations(lm: Any) -> dict[str, Destination]:
    """Name in the tree → where the tensor goes; see `destinations`."""
    found = destinations(lm)
    for name, param in lm.named_parameters():
        if not param.is_contiguous():
            found[name] = replace(found[name], load=partial(fill_laid_out, param))
    for name, buffer in lm.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in lm.get_submodule(owner)._non_persistent_buffers_set:
            found[name] = Destination(tuple(buffer.shape), buffer.copy_)
    return found


def _plan(lm: Any, files: list[Path], targets: dict[str, Destination]) -> _Plan:
    """Compare the files' headers with what the model needs, as far as that can be said without reading."""
    rules = get_model_conversion_mapping(lm)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known: dict[str, Any] = {**dict.fromkeys(targets, True), **dict.fromkeys(_aliases(lm), True)}
    plan, extra = _Plan({}, {}, {}), []
    for name, file in sorted(_names(files), key=lambda found: dot_natural_key(found[0])):
        renamed, pattern = rename_source_key(name, renamings, converters, lm.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = name, None
        if pattern is not None:
            merge = plan.merges.setdefault(renamed, _Merge(copy.deepcopy(of_pattern[pattern])))
            merge.tensors.append((pattern, file, name))
        elif renamed in targets:
            plan.direct.setdefault(file, []).append((name, renamed))
        elif (found := IN_BLOCKS.fullmatch(renamed)) and _is_stack(targets.get(found[1])):
            plan.blocks.setdefault(found[1], {})[found[2]] = file, name
        elif not _superfluous(lm, renamed, known):
            extra.append(name)
    if extra:
        raise ModelUnsupported(f"the checkpoint holds {some(extra)}, which the model would not use")
    if not plan.merges and (left := set(targets) - _direct(plan) - set(plan.blocks) - _optional(lm, targets)):
        raise ModelUnsupported(f"the checkpoint lacks {some(left)}")
    _check_direct(plan, targets)
    _check_blocks(plan, targets)
    return plan


def _direct(plan: _Plan) -> set[str]:
    return {renamed for names in plan.direct.values() for _, renamed in names}


def _check_direct(plan: _Plan, targets: dict[str, Destination]) -> None:
    for file, names in plan.direct.items():
        with open_file(file) as tensors:
            for name, renamed in names:
                check_tensor(name, tensors.get_slice(name), targets[renamed])


def _is_stack(target: Destination | None) -> bool:
    """Whether it is a tensor of all experts."""
    return target is not None and target.shape is not None and len(target.shape) == 3


def _check_blocks(plan: _Plan, targets: dict[str, Destination]) -> None:
    direct = _direct(plan)
    for name, found in plan.blocks.items():
        if lacking := {"blocks", "scales"} - set(found):
            raise ModelUnsupported(f"the checkpoint lacks {name}_{lacking.pop()}")
        if name in direct:
            raise ModelUnsupported(f"the checkpoint holds {name} twice: as it is, and in blocks")
        shape = targets[name].shape
        assert shape is not None
        with contextlib.ExitStack() as stack:
            blocks, scales = (
                stack.enter_context(open_file(file)).get_slice(stored)
                for file, stored in (found["blocks"], found["scales"])
            )
            check_blocks(name, blocks, scales, shape)


def _names(files: list[Path]) -> Iterator[tuple[str, Path]]:
    for file in files:
        with open_file(file) as tensors:
            yield from ((name, file) for name in tensors.keys())  # noqa: SIM118, not a dict


def _aliases(lm: Any) -> set[str]:
    """Names of parameters that are others of the tree: a tied head."""
    return {name for name, _ in lm.named_parameters(remove_duplicate=False)} | {
        f"{path}.weight" for path, m in lm.named_modules() if m is lm.get_output_embeddings()
    }


def _superfluous(lm: Any, name: str, known: dict[str, Any]) -> bool:
    """Whether a checkpoint may hold a tensor that the model has no use for."""
    ignored = [*(lm._keys_to_ignore_on_load_unexpected or ()), SUPERFLUOUS.pattern]
    buffers = {key for key, _ in lm.named_buffers()}
    return name in known or name in buffers or any(re.search(pattern, name) for pattern in ignored)


def _optional(lm: Any, targets: dict[str, Destination]) -> set[str]:
    """What a checkpoint need not hold: buffers, which the config gives values, and what formats say."""
    buffers = {key for key, _ in lm.named_buffers()}
    return buffers & set(targets) | {name for name, target in targets.items() if target.optional}


def _tensors(lm: Any, plan: _Plan, targets: dict[str, Destination]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in the tree with their tensors, of which few are in memory at a time."""
    for file, names in plan.direct.items():
        with open_file(file) as tensors:
            for name, renamed in names:
                yield renamed, targets[renamed].read(tensors, name)
    for name, found in plan.blocks.items():
        yield name, _dequantised(name, found, lm.get_parameter(name), targets[name])
    for first, merge in plan.merges.items():
        sources = _sources(merge.converter, targets.get(first))
        for pattern, file, name in merge.tensors:
            add = partial(merge.converter.add_tensor, first, name, pattern)
            held = sources.get(pattern)
            source = Destination(held.shape, add, held.part) if held else Destination(None, add)
            with open_file(file) as tensors:
                if held:
                    check_tensor(name, tensors.get_slice(name), source)
                source.load(source.read(tensors, name))
        converted = merge.converter.convert(first, model=lm, config=lm.config)
        for name, found in converted.items():
            yield name, _held(name, found[0] if isinstance(found, list) else found, targets, whole=not sources)


def _dequantised(
    name: str, stored: dict[str, tuple[Path, str]], param: torch.Tensor, target: Destination
) -> torch.Tensor:
    """What the parameter, this rank's part of [experts, in, out], is to hold, which is stored in blocks; computed
    where it is. Of blocks that lie across its ends the numbers of others are dropped."""
    assert target.shape is not None
    experts, ins, outs = target.part or tuple(map(range, target.shape))
    assert isinstance(ins, range), "gate and up are outputs"
    blocks_of = range(ins.start // BLOCK, -(-ins.stop // BLOCK))
    read = []
    for file, tensor_name in (stored["blocks"], stored["scales"]):
        with open_file(file) as tensors:
            shape = tuple(tensors.get_slice(tensor_name).get_shape())
            part = (experts, outs, blocks_of, *map(range, shape[3:]))
            read.append(Destination(shape, param.copy_, part).read(tensors, tensor_name).to(param.device))
    blocks, scales = read
    try:
        found = dequantised(blocks, scales, param.dtype).transpose(1, 2)
    except ValueError as e:
        raise ModelUnsupported(f"{name}, stored in blocks: {e}") from None
    return found.narrow(1, ins.start - blocks_of.start * BLOCK, len(ins))


def _sources(converter: WeightConverter, target: Destination | None) -> dict[str, HeldParameter]:
    """What to read of the tensors of every pattern so that this rank's part of the target comes out of them.

    Empty: they are read whole. So they are unless what is done to them is known: matrices of all experts are stacked,
    then perhaps gate and up concatenated.
    """
    steps, patterns = list(converter.operations), list(converter.source_patterns)
    stacks = [type(step) for step in steps] in ([MergeModulelist], [MergeModulelist, Concatenate])
    if target is None or target.shape is None or not target.part or not stacks or steps[0].dim != 0:
        return {}
    shape, part = target.shape[1:], target.part[1:]
    if len(patterns) == 1:
        return {patterns[0]: HeldParameter(shape, part)}
    dim = steps[-1].dim - 1
    ranges, width = part[dim], shape[dim] // len(patterns)
    if isinstance(ranges, range) or len(ranges) != len(patterns):
        return {}
    found = {}
    for number, (pattern, held) in enumerate(zip(patterns, ranges, strict=True)):
        own = range(held.start - number * width, held.stop - number * width)
        parts = (*part[:dim], own, *part[dim + 1 :])
        found[pattern] = HeldParameter((*shape[:dim], width, *shape[dim + 1 :]), parts)
    return found


def _held(name: str, tensor: torch.Tensor, targets: Mapping[str, Destination], *, whole: bool) -> torch.Tensor:
    """The part of a converted tensor that this rank holds. whole: it is not that already.

    Raises ModelUnsupported if the model has no place for it.
    """
    if name not in targets:
        raise ModelUnsupported(f"the checkpoint gives {name}, which the model would not use")
    expected, part = targets[name].shape, targets[name].part
    if not whole:
        expected, part = targets[name].held_shape, ()
    if expected is not None and tuple(tensor.shape) != expected:
        shape = list(tensor.shape)
        raise ModelUnsupported(f"tensor {name} has shape {shape}, the config asks for {list(expected)}")
    return take(tensor, part)
