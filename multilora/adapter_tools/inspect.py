"""`multilora adapters inspect`: what one adapter is, and whether a base model can serve it.

Its verdict is the loader's: the adapter is loaded, as by a server, up to packed pages in host memory. Of the base
model only the config is read, and the tables that the adapter has copies of. Called by `cli/adapter_commands.py`.
"""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from multilora.adapter_tools.facts import Row, method, rows
from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.loading.loader import FetchContext, FetchJob, allocate_private, fetch
from multilora.adapters.packing.blocks import PackTarget
from multilora.adapters.peft.base_model import BaseModel
from multilora.adapters.peft.config import PeftConfig, parse_config
from multilora.adapters.peft.safetensors_file import SafetensorsFile, TensorInfo
from multilora.adapters.sources import resolve
from multilora.adapters.sources.files import find_files, read_json_object, show
from multilora.errors import MultiloraError, from_wire
from multilora.models.load import make_model


@dataclass(frozen=True)
class Served:
    """The memory that the adapter takes when it is served. page_bytes follows from model, dtype and --page-size."""

    model_path: str
    dtype: str
    page_bytes: int
    pages: int
    nbytes: int


@dataclass
class Inspection:
    """What was found out about one adapter. compatible: None if no model is given and the files are sound."""

    path: str
    directory: str | None = None
    method: str | None = None
    base_model_name_or_path: str | None = None
    peft_version: str | None = None
    bytes_on_disk: int | None = None
    tensors: int = 0
    parameters: int = 0
    dtypes: list[str] = field(default_factory=list)
    modules: list[Row] = field(default_factory=list)
    compatible: bool | None = None
    error: dict[str, str] | None = None  # kind, message
    served: Served | None = None

    @property
    def ok(self) -> bool:
        return self.error is None


def inspect(path: str, model_path: str | None = None, *, dtype: str = "auto", page_size: int = 16) -> Inspection:
    """Everything that can be found out about the adapter at `path`, a directory or hub id as the server takes it.

    dtype: the one that the model would be served in; auto: its checkpoint's. Raises ConfigError or ModelUnsupported
    for a bad model; what is wrong with the adapter is part of the result.
    """
    target = None if model_path is None else _target(model_path, dtype, page_size)
    report = Inspection(path)
    try:
        directory = resolve(path)
        _read_files(directory, report)
        if model_path is not None and target is not None:
            report.served = _served(directory, model_path, *target)
            report.compatible = True
    except MultiloraError as e:
        report.compatible = False
        report.error = {"kind": e.kind, "message": e.message}
    return report


def _read_files(directory: Path, report: Inspection) -> None:
    """Fill in what the files say. If this raises, the report keeps what had been found."""
    report.directory = str(directory)
    files = find_files(directory)
    raw = read_json_object(files.config)
    report.method = method(raw)
    report.base_model_name_or_path = _text(raw.get("base_model_name_or_path"))
    report.peft_version = _text(raw.get("peft_version"))
    config: PeftConfig | None = None
    problem: MultiloraError | None = None
    try:
        config = parse_config(raw, files.config)
    except MultiloraError as e:
        problem = e  # raised below; the weights can still be described
    tensors: dict[str, TensorInfo] = {}
    with contextlib.ExitStack() as stack:
        for file in files.weights:
            tensors |= stack.enter_context(SafetensorsFile(file)).tensors
    report.bytes_on_disk = sum(os.stat(file).st_size for file in files.all)
    report.tensors = len(tensors)
    report.dtypes = sorted({_name(info.dtype) for info in tensors.values()})
    report.modules = rows(tensors, config)
    report.parameters = sum(row.parameters for row in report.modules)
    if problem is not None:
        raise problem


def _target(model_path: str, dtype: str, page_size: int) -> tuple[BaseModel, PackTarget]:
    """The base model, without its weights, and what adapters are packed for."""
    model = make_model(model_path, dtype=dtype, device=torch.device("meta"))
    weights = model_path if os.path.isdir(model_path) else None
    page_bytes = model.kv_layout(page_size).page_bytes
    return BaseModel.of(model, weights), PackTarget(model.lora_sites(), model.config.adapter_dtype, page_bytes)


def _served(directory: Path, model_path: str, base: BaseModel, target: PackTarget) -> Served:
    """Load the adapter into host memory. Raises the error that a server's load would end with."""
    fetched, pages = fetch(FetchJob(0, str(directory)), FetchContext(base, target, AdapterLimits()), allocate_private)
    if pages is None:
        raise from_wire(fetched.kind, fetched.message)
    return Served(model_path, _name(target.dtype), target.page_bytes, len(pages), pages.numel())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(value: object) -> str | None:
    """A string of the config as it is, anything else as its repr."""
    return value if value is None or isinstance(value, str) else show(value)
