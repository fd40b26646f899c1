"""An adapter's tensors, in one file or in shards, sorted by the base model's modules, from the headers alone.

This file makes sure that every tensor has a name that PEFT gives and belongs to one module of the base model, and
that none comes twice. What must be there, and how it acts, is checked by `checkpoint_lora.py` and
`checkpoint_full_weights.py`. Called by `checkpoint.py`.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from multilora.adapters.peft.base_model import SCORE_PLACE, BaseModel, Place
from multilora.adapters.peft.config import PeftConfig
from multilora.adapters.peft.safetensors_file import SafetensorsFile, TensorInfo
from multilora.adapters.peft.tensor_names import OF_ONE_ADAPTER, WRAPPED, Part, parse
from multilora.adapters.sources.files import INDEX_NAME, AdapterFiles, show
from multilora.adapters.thread_pool import ALONE, ReaderPool
from multilora.errors import AdapterError, AdapterIncompatible, AdapterInvalid, AdapterUnsupported
from multilora.lora.sites import EMBED, HEAD, SCORE, TABLES, module_path

TABLE_PARTS = (Part.WEIGHT, Part.SAVED_WEIGHT, Part.BASE_WEIGHT, Part.TOKENS_BASE, Part.ORIGINAL_WEIGHT)
EXPERT = re.compile(r"(?P<parent>[\w.]+)\.(?P<expert>[0-9]{1,6})\.(?P<leaf>\w+)")
MAX_LABELS = 1 << 16
LAYER = re.compile(r"(?P<layer>[0-9]{1,6})\.(?P<rest>[\w.]+)")


class Tensors:
    """All tensors of one adapter, whether in one file or in shards."""

    def __init__(self, files: list[SafetensorsFile]):
        self.opened = files
        self.files = ", ".join(file.path.name for file in files)  # as messages name them
        self._file_of = {name: file for file in files for name in file.tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def info(self, name: str) -> TensorInfo:
        return self._file_of[name].tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def read(self, name: str) -> torch.Tensor:
        """The tensor in the file's dtype. See `SafetensorsFile.read`."""
        return self._file_of[name].read(name)

    def where(self, name: str) -> str:
        """File and tensor, as messages name them."""
        return f"{self._file_of[name].path.name}: tensor {show(name)}"


def open_tensors(files: AdapterFiles, stack: contextlib.ExitStack, readers: ReaderPool = ALONE) -> Tensors:
    """Open every file and read its header. Raises AdapterInvalid if the index of shards says something else."""
    opened = [stack.enter_context(SafetensorsFile(path, readers)) for path in files.weights]
    if files.shard_of is not None:
        found = {(name, file.path.name) for file in opened for name in file.tensors}
        for name, shard in sorted(found ^ set(files.shard_of.items())):
            raise AdapterInvalid(f"{INDEX_NAME}: {show(shard)} and the index disagree about tensor {show(name)}")
    return Tensors(opened)


@dataclass(frozen=True)
class Module:
    """What the files hold for one module. name: its path in the base model, as the tensors' names spell it."""

    place: Place
    name: str
    tensors: dict[Part, str] = field(default_factory=dict)

    @property
    def has_lora(self) -> bool:
        return not self.tensors.keys().isdisjoint((Part.LORA_A, Part.LORA_B, Part.EMBEDDING_A, Part.EMBEDDING_B))


@dataclass(frozen=True)
class Contents:
    """One adapter as its files hold it, and the base model that it must fit.

    vocab_size: the base model's, unless the adapter brings full tables with more or fewer rows.
    """

    tensors: Tensors
    config: PeftConfig
    base: BaseModel
    modules: dict[Place, Module]  # by layer, then as in the model's sites
    vocab_size: int
    experts: dict[Place, Module] = field(default_factory=dict)  # those of experts, which are not among `modules`

    @property
    def resized(self) -> bool:
        return self.vocab_size != self.base.vocab_size

    def widths(self, module: str) -> tuple[int, int]:
        """in_features and out_features of a linear module or a table, for this adapter."""
        width_in, width_out = self.base.shapes[module]
        if module == EMBED:
            return self.vocab_size, width_out
        return width_in, self.vocab_size if module == HEAD else width_out

    def weight_shape(self, module: str) -> tuple[int, ...]:
        """The shape of the module's own weight, as checkpoints store it."""
        if module in self.base.norm_sizes:
            return (self.base.norm_sizes[module],)
        if module in TABLES:
            return (self.vocab_size, self.base.hidden_size)
        if module == SCORE:
            return (self.num_labels, self.base.hidden_size)
        width_in, width_out = self.base.shapes[module]
        return (width_in, width_out) if module in self.base.transposed else (width_out, width_in)

    @property
    def num_labels(self) -> int:
        """The rows of the adapter's own classification head, which it must have."""
        tensors = self.modules[SCORE_PLACE].tensors
        shapes = [self.tensors.shape(tensors[p]) for p in (Part.WEIGHT, Part.SAVED_WEIGHT) if p in tensors]
        return min(max((shape[0] for shape in shapes if shape), default=1), MAX_LABELS)

    def error(self, kind: type[AdapterError], module: Module, part: Part, what: str) -> AdapterError:
        """An error of type `kind` about one tensor, to be raised by the caller."""
        return kind(f"{self.tensors.where(module.tensors[part])}: {what}")

    def check_shape(self, module: Module, part: Part, expected: tuple[int, ...]) -> None:
        """Check the shape of one tensor. Raises AdapterIncompatible."""
        found = self.tensors.shape(module.tensors[part])
        if found == expected:
            return
        if part in TABLE_PARTS and module.place.module in TABLES and len(found) == 2 and found[1] == expected[1]:
            what = other_vocabulary(module.place.module, found[0], self.base.vocab_size)
            raise self.error(AdapterIncompatible, module, part, what)
        what = f"does not fit the base model: expected {list(expected)}, found {list(found)}"
        raise self.error(AdapterIncompatible, module, part, f"{part.value} of {show(module.name)} {what}")


def other_vocabulary(table: str, found: int, rows: int) -> str:
    """The message for a table of another size: it is served only if the adapter brings both tables."""
    return (
        f"does not fit the base model: {table} has {found} rows in the adapter, {rows} in the base model. Either the "
        f"adapter holds all of {EMBED} and {HEAD}, equally large (save_embedding_layers), or the base model is one "
        "with the same vocabulary"
    )


def sort_tensors(tensors: Tensors, config: PeftConfig, base: BaseModel) -> Contents:
    """Sort all tensors by module. Raises AdapterInvalid or AdapterIncompatible for one that belongs to none."""
    modules: dict[Place, Module] = {}
    adapter_names: set[str | None] = set()
    for name in tensors:
        found = parse(name)
        if found is None:
            raise AdapterInvalid(f"{tensors.where(name)}: left over: not a tensor that PEFT saves with LoRA")
        if found.part in OF_ONE_ADAPTER:
            adapter_names.add(found.adapter)
            if len(adapter_names) > 1:
                raise AdapterInvalid(f"{tensors.where(name)}: the file holds more than one adapter")
        path = _unwrapped(found.module, config, base)
        place = base.place_of(path)
        if place is None:
            raise _no_place(path, tensors.where(name), config, base)
        module = modules.setdefault(place, Module(place, path))
        if found.part in module.tensors:
            raise AdapterInvalid(f"{tensors.where(name)}: {found.part.value} of {show(module.name)} is given twice")
        module.tensors[found.part] = name
    if not modules:
        raise AdapterInvalid(f"{tensors.files}: the adapter holds no tensors")
    in_order = sorted(modules, key=lambda place: (place.layer, base.order.get(place.module, len(base.order))))
    experts = {place: modules[place] for place in in_order if base.is_of_experts(place)}
    modules = {place: modules[place] for place in in_order if place not in experts}
    return Contents(tensors, config, base, modules, _vocab_size(modules, tensors, base), experts)


def _unwrapped(module: str, config: PeftConfig, base: BaseModel) -> str:
    """The module, or the parameter that the wrapper of this name is around: the first of those that target_parameters
    means is wrapped first, then each that follows wraps the wrapper before it."""
    container = _container(module)
    wrapped = _wrapped(container, config, base)
    depth = module.removeprefix(container).count(WRAPPED)
    return wrapped[-1 - depth] if depth < len(wrapped) else module


def _container(wrapper: str) -> str:
    """The module whose parameters wrappers like this one are around."""
    while wrapper.endswith(f".{WRAPPED}"):
        wrapper = wrapper.removesuffix(f".{WRAPPED}")
    return wrapper


def _wrapped(container: str, config: PeftConfig, base: BaseModel) -> list[str]:
    names = (f"{container}.{name}" for name in base.parameters_of(container))
    return [name for name in names if config.targets_parameter(name)]


def _vocab_size(modules: dict[Place, Module], tensors: Tensors, base: BaseModel) -> int:
    """Rows of the full tables in the files; the base model's if there are none, or if they contradict each other."""
    found = {
        shape[0]
        for place, module in modules.items()
        if place.module in TABLES
        for part in TABLE_PARTS
        if part in module.tensors and len(shape := tensors.shape(module.tensors[part])) == 2
    }
    return found.pop() if len(found) == 1 and 0 not in found else base.vocab_size


def _no_place(module: str, where: str, config: PeftConfig, base: BaseModel) -> AdapterError:
    if base.takes_no_adapters(module):
        what = "it runs as transformers has it (docs/models.md, mixtures of experts)"
        return AdapterUnsupported(f"{where}: adapters on {show(module)} are not supported: {what}")
    if (message := _beyond_experts(module, base) or _no_wrapper(module, config, base)) is not None:
        return AdapterIncompatible(f"{where}: {message}")
    inner = f"{base.layers.removeprefix(base.inner)}."
    found = LAYER.fullmatch(module.removeprefix(base.inner).removeprefix(inner))
    if found is not None and module_path(0, "", found["rest"], base.layers) in base.places:
        message = f"layer {int(found['layer'])} is out of range, the base model has {base.num_layers} layers"
        return AdapterIncompatible(f"{where}: {message}")
    return AdapterIncompatible(f"{where}: the base model has no module {show(module)}")


def _beyond_experts(module: str, base: BaseModel) -> str | None:
    """The message for a module of an expert that the base model does not have."""
    found = EXPERT.fullmatch(module)
    place = base.place_of(f"{found['parent']}.0.{found['leaf']}") if found is not None else None
    if found is None or place is None or not base.is_of_experts(place):  # a layer's path looks the same
        return None
    count = base.expert_place(place).experts
    return f"expert {int(found['expert'])} is out of range, the base model has {count} experts"


def _no_wrapper(module: str, config: PeftConfig, base: BaseModel) -> str | None:
    """The message for a wrapper of a parameter that is not targeted."""
    container = _container(module)
    if not (parameters := base.parameters_of(container)):
        return None
    count = len(_wrapped(container, config, base))
    what = f"target_parameters in {config.file} means {count} of {', '.join(parameters)}"
    return f"{show(module)} is a wrapper, but {what} there"
