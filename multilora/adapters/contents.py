"""An adapter's tensors, in however many files, sorted by the base model's modules. Headers only, until one is read.

Owns that every tensor has a name that PEFT gives, and a place in the base model, once. What must be there and how it
acts is for `checkpoint_lora` and `checkpoint_whole`. Called by `checkpoint`.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from multilora.adapters.base_model import PARENTS, BaseModel, Place
from multilora.adapters.crew import ALONE, Crew
from multilora.adapters.files import INDEX_NAME, AdapterFiles, show
from multilora.adapters.peft_config import PeftConfig
from multilora.adapters.safetensors_file import SafetensorsFile, TensorInfo
from multilora.adapters.tensor_names import OF_ONE_ADAPTER, Part, parse
from multilora.errors import AdapterError, AdapterIncompatible, AdapterInvalid

LAYER = re.compile(r"(?:model\.)?layers\.(?P<layer>[0-9]{1,6})\.(?P<rest>[\w.]+)")


class Tensors:
    """All tensors of one adapter, whether in one file or in shards."""

    def __init__(self, files: list[SafetensorsFile]):
        self._file_of = {name: file for file in files for name in file.tensors}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def info(self, name: str) -> TensorInfo:
        return self._file_of[name].tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def read(self, name: str) -> torch.Tensor:
        """In the file's dtype. The first call reads the whole file; its tensors share that memory."""
        return self._file_of[name].read(name)

    def where(self, name: str) -> str:
        """For messages."""
        return f"{self._file_of[name].path.name}: tensor {show(name)}"


def open_tensors(files: AdapterFiles, stack: contextlib.ExitStack, crew: Crew = ALONE) -> Tensors:
    """Open every file and read its header. Raises AdapterInvalid if the index of shards says something else."""
    opened = [stack.enter_context(SafetensorsFile(path, crew)) for path in files.weights]
    if files.shard_of is not None:
        found = {(name, file.path.name) for file in opened for name in file.tensors}
        for name, shard in sorted(found ^ set(files.shard_of.items())):
            raise AdapterInvalid(f"{INDEX_NAME}: {show(shard)} and the index disagree about tensor {show(name)}")
    return Tensors(opened)


@dataclass(frozen=True)
class Module:
    """What the files hold for one module. name: the module's inside the base model, as the tensors' names have it."""

    place: Place
    name: str
    tensors: dict[Part, str] = field(default_factory=dict)

    @property
    def has_lora(self) -> bool:
        return not self.tensors.keys().isdisjoint((Part.LORA_A, Part.LORA_B, Part.EMBEDDING_A, Part.EMBEDDING_B))


@dataclass(frozen=True)
class Contents:
    """One adapter as it lies in its files, and what it is to be held against."""

    tensors: Tensors
    config: PeftConfig
    base: BaseModel
    modules: dict[Place, Module]  # by layer, then as in the model's sites

    def error(self, kind: type[AdapterError], module: Module, part: Part, what: str) -> AdapterError:
        """About one tensor."""
        return kind(f"{self.tensors.where(module.tensors[part])}: {what}")

    def check_shape(self, module: Module, part: Part, expected: tuple[int, ...]) -> None:
        """Raises AdapterIncompatible; for a table of another vocabulary it says what to do."""
        found = self.tensors.shape(module.tensors[part])
        if found == expected:
            return
        rows = self.base.vocab_size
        if expected[0] == rows and len(found) == len(expected) and found[0] != rows and found[1:] == expected[1:]:
            raise self.error(AdapterIncompatible, module, part, other_vocabulary(module, found[0], rows))
        what = f"does not fit the base model: expected {list(expected)}, found {list(found)}"
        raise self.error(AdapterIncompatible, module, part, f"{part.value} of {show(module.name)} {what}")


def other_vocabulary(module: Module, found: int, rows: int) -> str:
    return (
        f"does not fit the base model: {module.place.module} has {found} rows in the adapter, {rows} in the base "
        "model: serve a base model with the same vocabulary (resized and saved as it was for training)"
    )


def sort_tensors(tensors: Tensors, config: PeftConfig, base: BaseModel) -> Contents:
    """Every tensor has its place. Raises AdapterInvalid, AdapterIncompatible."""
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
        place = base.places.get(found.module) or base.places.get(f"model.{found.module}")
        if place is None:
            raise _no_place(found.module, tensors.where(name), base)
        module = modules.setdefault(place, Module(place, found.module))
        if found.part in module.tensors:
            raise AdapterInvalid(f"{tensors.where(name)}: {found.part.value} of {show(module.name)} is given twice")
        module.tensors[found.part] = name
    if not modules:
        raise AdapterInvalid("the adapter holds no tensors")
    in_order = sorted(modules, key=lambda place: (place.layer, base.order.get(place.module, len(base.order))))
    return Contents(tensors, config, base, {place: modules[place] for place in in_order})


def _no_place(module: str, where: str, base: BaseModel) -> AdapterIncompatible:
    found = LAYER.fullmatch(module)
    if found is not None:
        layer, last = int(found["layer"]), found["rest"].rpartition(".")[2]
        known = last in base.shapes or last in base.norms
        if known and found["rest"] == PARENTS.get(last, "") + last and layer >= base.num_layers:
            message = f"layer {layer} is out of range, the base model has {base.num_layers} layers"
            return AdapterIncompatible(f"{where}: {message}")
    return AdapterIncompatible(f"{where}: the base model has no module {show(module)}")
