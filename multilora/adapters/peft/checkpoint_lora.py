"""The low-rank part of an adapter's files: lora_A and lora_B, DoRA's magnitudes, biases on lora_B.

It owns shapes, orientation and scalings. `check` reads headers only; `read` is for modules that have passed it.
Called by `checkpoint.py`.
"""

from collections.abc import Iterator

import torch

from multilora.adapters.adapter import Block, LowRank, Vector, VectorKind
from multilora.adapters.peft.base_model import SCORE_PLACE, Place
from multilora.adapters.peft.contents import Contents, Module, other_vocabulary
from multilora.adapters.peft.tensor_names import Part
from multilora.adapters.sources.files import show
from multilora.errors import AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from multilora.lora.sites import EMBED, HEAD, MODEL_LEVEL, TABLES

PAIR = (Part.LORA_A, Part.LORA_B)
EMBEDDING_PAIR = (Part.EMBEDDING_A, Part.EMBEDDING_B)
PARTS = frozenset((*PAIR, *EMBEDDING_PAIR, Part.LORA_BIAS, Part.MAGNITUDE, Part.VELORA))


def pair_of(module: Module) -> tuple[Part, Part]:
    """What A and B of the module are called."""
    return EMBEDDING_PAIR if module.place.module == EMBED else PAIR


def check(contents: Contents) -> list[Module]:
    """The modules with LoRA. Raises AdapterInvalid, AdapterIncompatible or AdapterUnsupported."""
    found = []
    for module in contents.modules.values():
        if module.has_lora:
            if module.place == SCORE_PLACE:
                what = "LoRA on the classification head is not supported; modules_to_save is"
                raise contents.error(AdapterUnsupported, module, next(iter(module.tensors)), what)
            _check_pair(module, contents)
            _check_vectors(module, contents)
            found.append(module)
        elif stray := PARTS & module.tensors.keys():
            part = next(iter(stray))
            raise contents.error(AdapterInvalid, module, part, f"left over: {show(module.name)} has no lora_A")
    tables = [module for module in found if module.place.module in TABLES]
    if len(tables) == 1 and contents.config.ties_targets(contents.base):
        what = f"{contents.config.file}: ensure_weight_tying is true, but only one of {EMBED} and {HEAD} has LoRA"
        raise contents.error(AdapterInvalid, tables[0], pair_of(tables[0])[0], what)
    return found


def rank_of(module: Module, contents: Contents) -> int:
    """The rank of a module that has passed `check`."""
    return contents.tensors.shape(module.tensors[pair_of(module)[0]])[0]


def _check_pair(module: Module, contents: Contents) -> None:
    tensors, config, base = contents.tensors, contents.config, contents.base
    part_a, part_b = pair_of(module)
    for part in (*PAIR, *EMBEDDING_PAIR):
        if part in module.tensors and part not in (part_a, part_b):
            what = f"left over: {show(module.name)} has {part_a.value} and {part_b.value}"
            raise contents.error(AdapterInvalid, module, part, what)
    for part, other in ((part_a, part_b), (part_b, part_a)):
        if part not in module.tensors:
            raise contents.error(AdapterInvalid, module, other, f"{other.value} without its {part.value}")
    if module.place.module not in base.shapes:
        raise contents.error(AdapterInvalid, module, part_a, f"LoRA on {show(module.name)}, which is no linear layer")
    if not config.targets(module.name, base):
        what = f"{config.file} does not target module {show(module.name)}"
        raise contents.error(AdapterInvalid, module, part_a, what)
    a, b = tensors.shape(module.tensors[part_a]), tensors.shape(module.tensors[part_b])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        what = f"shapes {list(a)} and {list(b)} of {part_a.value} and {part_b.value} disagree"
        raise contents.error(AdapterInvalid, module, part_a, what)
    width_in, width_out = contents.widths(module.place.module)
    if (a[1], b[0]) != (width_in, width_out):
        raise contents.error(AdapterIncompatible, module, part_b, _misfit(module, contents, a, b))
    rank = config.rank(module.name)
    if a[0] != rank:
        what = f"rank {a[0]}, but {config.file} says {rank} (r or rank_pattern)"
        raise contents.error(AdapterInvalid, module, part_a, what)


def _misfit(module: Module, contents: Contents, a: tuple[int, ...], b: tuple[int, ...]) -> str:
    width_in, width_out = contents.widths(module.place.module)
    if module.place.module == EMBED and b[0] == width_out:
        return other_vocabulary(EMBED, a[1], contents.base.vocab_size)
    if module.place.module == HEAD and a[1] == width_in:
        return other_vocabulary(HEAD, b[0], contents.base.vocab_size)
    return (
        f"module {show(module.name)} does not fit the base model: expected lora_A [{a[0]}, {width_in}] and lora_B "
        f"[{width_out}, {a[0]}], found {list(a)} and {list(b)}"
    )


def _check_vectors(module: Module, contents: Contents) -> None:
    """Check that the files hold the vectors that the config asks for, in the right shape, and no others."""
    config = contents.config
    part_a, part_b = pair_of(module)
    if module.place.module == EMBED:
        if config.use_dora:
            raise contents.error(AdapterUnsupported, module, part_a, "DoRA on the token embedding is not supported")
        if config.lora_bias or config.invocation_tokens:
            field = "lora_bias" if config.lora_bias else "alora_invocation_tokens"
            what = f"{config.file}: {field}: PEFT does not have it on the token embedding"
            raise contents.error(AdapterInvalid, module, part_a, what)
    width_out = contents.widths(module.place.module)[1]
    for part, wanted, field in (
        (Part.MAGNITUDE, config.use_dora, "use_dora"),
        (Part.LORA_BIAS, config.lora_bias, "lora_bias"),
        (Part.VELORA, config.velora, "velora_config"),
    ):
        if part in module.tensors and not wanted:
            what = f"left over: {field} is not set in {config.file}"
            raise contents.error(AdapterInvalid, module, part, what)
        if part is Part.VELORA:  # it acts in training only, and old files lack it
            continue
        if wanted and part not in module.tensors:
            what = f"{show(module.name)} has no {part.value}, but {field} is set in {config.file}"
            raise contents.error(AdapterInvalid, module, part_b, what)
        if wanted:
            contents.check_shape(module, part, (width_out,))
            if contents.resized and module.place.module == HEAD:
                what = f"{field} on a {HEAD} with another vocabulary than the base model's is not supported"
                raise contents.error(AdapterUnsupported, module, part, what)


def read(module: Module, contents: Contents) -> Iterator[Block]:
    """The module's blocks: tensors as they are stored, and the scaling."""
    tensors = contents.tensors
    yield (low_rank := _low_rank(module, contents))
    if Part.MAGNITUDE in module.tensors:
        yield Vector(*module.place, VectorKind.MAGNITUDE, tensors.read(module.tensors[Part.MAGNITUDE]))
    if Part.LORA_BIAS in module.tensors:
        bias = tensors.read(module.tensors[Part.LORA_BIAS])
        yield Vector(*module.place, VectorKind.LORA_BIAS, bias, low_rank.scaling)


def table_delta(module: Module, contents: Contents) -> torch.Tensor:
    """scaling · BA of a table, fp32 [vocab, hidden], for resized tables, which no site of the model fits."""
    block = _low_rank(module, contents)
    left, right = (block.a, block.b) if module.place.module == EMBED else (block.b, block.a)
    return block.scaling * (left.float().T @ right.float())


def _low_rank(module: Module, contents: Contents) -> LowRank:
    tensors = contents.tensors
    part_a, part_b = pair_of(module)
    a = tensors.read(module.tensors[part_a])  # [rank, in]; of the embedding [rank, vocab]
    b = tensors.read(module.tensors[part_b])  # [out, rank]
    if module.place.module == HEAD and contents.config.ties_targets(contents.base):
        embedding = contents.modules[Place(MODEL_LEVEL, EMBED)].tensors
        embedding_a, embedding_b = (tensors.read(embedding[part]) for part in EMBEDDING_PAIR)
        if not torch.equal(a, embedding_b.T) or not torch.equal(b, embedding_a.T):
            what = f"{contents.config.file}: ensure_weight_tying is true, but {HEAD} and {EMBED} differ"
            raise contents.error(AdapterInvalid, module, part_a, what)
    scaling = contents.config.scaling(module.name, rank=a.shape[0])
    return LowRank(*module.place, a, b.T, scaling)
