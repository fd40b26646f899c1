"""What an adapter's files hold beside the low rank: full weights, trained biases, token rows, copies of the base's.

PEFT has four ways to save these, and each names the tensor differently (`tensor_names.Part`):

    modules_to_save            q_proj.weight, q_proj.bias, norm.weight         → Full, and Vector for a bias
    bias "lora_only", "all"    q_proj.base_layer.bias, k_proj.bias             → Vector
    trainable_token_indices    embed_tokens.token_adapter.…_delta              → Rows
    save_embedding_layers      embed_tokens.weight or ….base_layer.weight      → Full (the table of the model that the
                                                                                 adapter was trained on)

A table is embed_tokens or lm_head. However it was saved, only the rows that differ from the base model's are returned
if these are few, and none if all are equal. With added tokens the files hold both tables, larger than the base
model's, and LoRA on them is added in. `plan` reads headers only, `read` needs its result. Called by `checkpoint.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from multilora.adapters.adapter import Block, Full, Rows, Vector, VectorKind
from multilora.adapters.peft.base_model import SCORE_PLACE, Place
from multilora.adapters.peft.base_weights import differing_rows
from multilora.adapters.peft.checkpoint_lora import PARTS as LORA_PARTS
from multilora.adapters.peft.contents import Contents, Module, other_vocabulary
from multilora.adapters.peft.tensor_names import Part
from multilora.adapters.sources.files import show
from multilora.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from multilora.lora.sites import EMBED, HEAD, MODEL_LEVEL, TABLES

SAVED = frozenset((Part.WEIGHT, Part.BIAS, Part.SAVED_WEIGHT, Part.SAVED_BIAS))
ORIGINAL = frozenset((Part.ORIGINAL_WEIGHT, Part.ORIGINAL_BIAS))
COPIES = (Part.WEIGHT, Part.BASE_WEIGHT, Part.TOKENS_BASE, Part.ORIGINAL_WEIGHT)
EMBED_PLACE, HEAD_PLACE = Place(MODEL_LEVEL, EMBED), Place(MODEL_LEVEL, HEAD)
MAX_ADDED = 1 << 17  # rows of a table: the logits of a step are as wide as the widest adapter's
FEW_ROWS = 0.5  # of a table: up to this share, rows are returned, above it the table


@dataclass(frozen=True)
class FullWeightPlan:
    """What will be read, by the names of tensors. A copy that differs replaces what PEFT would load it into."""

    full: dict[Place, str]
    bias: dict[Place, str]
    rows: dict[str, tuple[tuple[int, ...], str]]  # embed_tokens or lm_head → token ids in the file's order, tensor
    copies: dict[str, tuple[str, ...]]  # the same → tensors, which must be equal

    @property
    def modules(self) -> set[str]:
        """The modules that will certainly be changed; a copy may turn out to be equal."""
        return {place.module for place in (*self.full, *self.bias)} | set(self.rows)


def plan(contents: Contents) -> FullWeightPlan:
    """What to read. Raises AdapterInvalid, AdapterIncompatible or AdapterUnsupported."""
    config, base = contents.config, contents.base
    trained = config.tokens(base)
    if config.ties_tokens(base):
        trained[HEAD] = trained[EMBED]
    for module in contents.modules.values():
        _check_left_over(module, contents, module.place.module in trained)
    saved = {place for place, module in contents.modules.items() if config.saves(module.name, base)}
    _check_saved(saved, contents)
    found = FullWeightPlan({}, {}, _rows(trained, saved, contents), _copies(saved, contents))
    for place, module in contents.modules.items():
        _plan_module(module, place in saved, found, contents)
    for place in (*found.full, *(Place(MODEL_LEVEL, table) for table in found.rows)):
        _check_dora(place, contents)
    _check_resized(found, contents)
    return found


def _plan_module(module: Module, saved: bool, found: FullWeightPlan, contents: Contents) -> None:
    base, tensors = contents.base, module.tensors
    if saved:
        part = Part.WEIGHT if Part.WEIGHT in tensors else Part.SAVED_WEIGHT
        contents.check_shape(module, part, contents.weight_shape(module.place.module))
        found.full[module.place] = tensors[part]
    for part in (Part.BIAS, Part.BASE_BIAS) if not saved else (Part.BIAS, Part.SAVED_BIAS):
        if part in tensors and module.place not in found.bias:
            if module.place.module not in base.biased:
                what = f"the base model's {show(module.name)} has no bias"
                raise contents.error(AdapterIncompatible, module, part, what)
            contents.check_shape(module, part, (base.shapes[module.place.module][1],))
            found.bias[module.place] = tensors[part]


def _check_left_over(module: Module, contents: Contents, has_rows: bool) -> None:
    """Check that PEFT would load every tensor of the module. Raises AdapterInvalid or AdapterUnsupported."""
    config, is_table = contents.config, module.place.module in TABLES
    allowed = set(LORA_PARTS)
    if config.saves(module.name, contents.base):
        if module.has_lora:
            what = f"{show(module.name)} has LoRA and is in modules_to_save: PEFT does not load that"
            raise AdapterInvalid(f"{config.file}: {what}")
        allowed |= SAVED | ORIGINAL
    elif module.has_lora:
        allowed |= {Part.BASE_WEIGHT} if is_table else set()
        allowed |= {Part.BASE_BIAS} if config.bias != "none" else set()
    elif not has_rows:
        allowed |= {Part.WEIGHT} if is_table else set()
        allowed |= {Part.BIAS} if config.bias == "all" else set()
    if has_rows:
        allowed |= {Part.TOKENS, Part.TOKENS_BASE}
    for part in module.tensors:
        if part not in allowed:
            raise _left_over(module, part, contents)


def _left_over(module: Module, part: Part, contents: Contents) -> AdapterError:
    file, name = contents.config.file, show(module.name)
    unsupported = None
    if part is Part.BIAS and module.has_lora:
        unsupported = f"the bias of {name} under a name that PEFT does not load; save the adapter again"
    elif part in (Part.BASE_WEIGHT, Part.TOKENS_BASE, *ORIGINAL):
        unsupported = f"weights of the base model ({part.value} of {name}) are not supported"
    if unsupported is not None:
        return contents.error(AdapterUnsupported, module, part, unsupported)
    why = {
        Part.TOKENS: "trainable_token_indices",
        Part.BIAS: "modules_to_save or bias",
        Part.BASE_BIAS: "bias",
    }.get(part, "modules_to_save")
    return contents.error(AdapterInvalid, module, part, f"left over: {why} in {file} does not mean {name}")


def _check_saved(saved: set[Place], contents: Contents) -> None:
    """Check that the files hold everything that modules_to_save means. Raises AdapterInvalid."""
    config, base = contents.config, contents.base
    if not config.modules_to_save:
        return
    inner = any(module.name not in base.places for module in contents.modules.values())
    for path, place in base.places.items():
        name = path.removeprefix(base.inner) if inner else path
        module = name.rpartition(".")[0] if base.is_of_experts(place) else name  # theirs are parameters to PEFT
        if not config.saves(module, base) or (inner and place == HEAD_PLACE):
            continue
        if place == SCORE_PLACE and place not in contents.modules:
            continue  # PEFT writes the names of all heads that it knows
        held = contents.modules[place].tensors if place in saved else {}
        if not {Part.WEIGHT, Part.SAVED_WEIGHT} & held.keys():
            raise AdapterInvalid(f"{config.file}: modules_to_save means {show(name)}, whose weight is missing")
        if place.module in base.biased and not {Part.BIAS, Part.SAVED_BIAS} & held.keys():
            raise AdapterInvalid(f"{config.file}: modules_to_save means {show(name)}, whose bias is missing")


def _rows(
    trained: dict[str, tuple[int, ...]], saved: set[Place], contents: Contents
) -> dict[str, tuple[tuple[int, ...], str]]:
    config, base = contents.config, contents.base
    tied = config.ties_tokens(base)
    found = {}
    for table, ids in trained.items():
        place = Place(MODEL_LEVEL, table)
        own = EMBED_PLACE if tied else place  # the module that the rows were trained for
        module = contents.modules.get(own)
        if module is None or Part.TOKENS not in module.tensors:
            raise AdapterInvalid(f"{config.file}: trainable_token_indices means {own.module}, whose rows are missing")
        with_lora = place in contents.modules and contents.modules[place].has_lora
        if place in saved or (with_lora and not (tied and place == HEAD_PLACE)):
            what = f"{table} has LoRA or is in modules_to_save, and has trainable_token_indices"
            raise AdapterInvalid(f"{config.file}: {what}: PEFT does not load that")
        contents.check_shape(module, Part.TOKENS, (len(ids), base.hidden_size))
        if ids and max(ids) >= contents.vocab_size:
            raise AdapterIncompatible(
                f"{config.file}: trainable_token_indices: token {max(ids)} is beyond the vocabulary of "
                f"{contents.vocab_size}: added tokens need all of {EMBED} and {HEAD} (save_embedding_layers)"
            )
        if ids:
            found[table] = ids, module.tensors[Part.TOKENS]
    return found


def _copies(saved: set[Place], contents: Contents) -> dict[str, tuple[str, ...]]:
    """Tables copied from the model that the adapter was trained on. In tied models each copy stands for both."""
    found: dict[str, tuple[str, ...]] = {}
    for place in (EMBED_PLACE, HEAD_PLACE):
        module = contents.modules.get(place)
        if module is None:
            continue
        part = next((p for p in COPIES if p in module.tensors and not (p is Part.WEIGHT and place in saved)), None)
        if part is None:
            continue
        contents.check_shape(module, part, contents.weight_shape(place.module))
        for table in TABLES if contents.base.tie_word_embeddings else (place.module,):
            if Place(MODEL_LEVEL, table) not in saved:
                found[table] = (*found.get(table, ()), module.tensors[part])
    return found


def _check_resized(found: FullWeightPlan, contents: Contents) -> None:
    """Check that added tokens have a row in both tables. Raises AdapterIncompatible."""
    tables = {place.module for place in found.full} | set(found.copies)
    if contents.resized and not tables.issuperset(TABLES):
        held, missing = (EMBED, HEAD) if EMBED in tables else (HEAD, EMBED)
        what = other_vocabulary(held, contents.vocab_size, contents.base.vocab_size)
        raise AdapterIncompatible(f"{contents.config.file}: {missing} is missing, and the adapter {what}")
    if contents.vocab_size > contents.base.vocab_size + MAX_ADDED:
        what = f"{contents.vocab_size} rows in the adapter, {contents.base.vocab_size} in the base model"
        raise AdapterIncompatible(f"{contents.config.file}: {EMBED} has {what}: at most {MAX_ADDED} may be added")


def _check_dora(place: Place, contents: Contents) -> None:
    """Refuse DoRA on a module whose weight is replaced: its norm is taken over the base model's own weight."""
    module = contents.modules.get(place)
    if module is not None and Part.MAGNITUDE in module.tensors:
        what = f"DoRA on {show(module.name)}, whose weight the adapter replaces, is not supported"
        raise contents.error(AdapterUnsupported, module, Part.MAGNITUDE, what)


def read(found: FullWeightPlan, contents: Contents, deltas: Mapping[str, torch.Tensor]) -> Iterator[Block]:
    """The blocks: full weights, biases and rows. deltas: table → what LoRA adds to it, fp32 [vocab, hidden].

    Raises AdapterInvalid if tensors that PEFT loads into one table differ, AdapterError if the base model is gone.
    """
    tensors = contents.tensors
    tables: dict[str, torch.Tensor] = {}
    for table, (name, *others) in found.copies.items():
        for other in others:
            _check_equal(name, other, contents)
        tables[table] = tensors.read(name)
    if contents.config.ties_saved(contents.base) and {EMBED_PLACE, HEAD_PLACE} <= found.full.keys():
        _check_equal(found.full[EMBED_PLACE], found.full[HEAD_PLACE], contents)
    for place, name in found.full.items():
        if place in (EMBED_PLACE, HEAD_PLACE):
            tables[place.module] = tensors.read(name)
        else:
            weight = tensors.read(name)
            yield Full(*place, weight.T.contiguous() if place.module in contents.base.transposed else weight)
    for place, name in found.bias.items():
        yield Vector(*place, VectorKind.BIAS, tensors.read(name))
    for table in TABLES:
        ids, name = found.rows.get(table, ((), ""))
        rows = tensors.read(name) if ids else None  # [len(ids), hidden]
        if table in tables:
            yield from _table(table, _with_changes(tables[table], ids, rows, deltas.get(table)), contents)
        elif rows is not None:
            order = sorted(range(len(ids)), key=ids.__getitem__)
            yield Rows(table, tuple(ids[i] for i in order), rows[order])


def _with_changes(
    weight: torch.Tensor, ids: tuple[int, ...], rows: torch.Tensor | None, delta: torch.Tensor | None
) -> torch.Tensor:
    """A table [vocab, hidden] with other rows at `ids`, then `delta` added."""
    if rows is not None:
        weight = weight.to(torch.promote_types(weight.dtype, rows.dtype), copy=True)
        weight[list(ids)] = rows.to(weight.dtype)
    return weight if delta is None else weight.float() + delta


def _table(table: str, weight: torch.Tensor, contents: Contents) -> Iterator[Block]:
    """The block for a table, weight [vocab, hidden]: none if it equals the base model's, rows, or the full weight."""
    base = contents.base
    if base.weights_dir is not None and not contents.resized:
        places = (Place(MODEL_LEVEL, table), EMBED_PLACE)  # a tied model's checkpoint has no head
        names = tuple(f"{base.paths[place]}.weight" for place in places)
        names += tuple(name.removeprefix(base.inner) for name in names)  # a checkpoint of the decoder alone
        ids = differing_rows(weight, names, base.weights_dir)
        if not ids:
            return
        _check_dora(Place(MODEL_LEVEL, table), contents)
        if len(ids) <= FEW_ROWS * len(weight):
            yield Rows(table, tuple(ids), weight[ids])
            return
    _check_dora(Place(MODEL_LEVEL, table), contents)
    yield Full(MODEL_LEVEL, table, weight)


def _check_equal(name: str, other: str, contents: Contents) -> None:
    """Check that two tensors which PEFT loads into one table are equal. Raises AdapterInvalid."""
    if not torch.equal(contents.tensors.read(name), contents.tensors.read(other)):
        what = f"differs from {show(name)}, but the word embeddings are tied"
        raise AdapterInvalid(f"{contents.tensors.where(other)}: {what}")
