"""For trainers: a PEFT state dict in shared memory, and the message that has a server on this machine load it.

    with SharedAdapter(get_peft_model_state_dict(model)) as shared:
        for step in …:
            shared.write(get_peft_model_state_dict(model))
            post("/load_lora_adapter_from_tensors", shared.message("policy", config, weight_version=str(step)))

The server copies the tensors before it answers, so the same memory serves every step. The server must be a process of
the same user that sees the same /dev/shm. Knows no HTTP.
"""

from collections.abc import Mapping
from multiprocessing.shared_memory import SharedMemory
from types import TracebackType
from typing import Any, Self

import torch

ALIGNMENT = 64  # bytes; torch reads fastest what is aligned


class SharedAdapter:
    """One segment of shared memory with all tensors, which are written there at once. Owns the segment: `close`, or
    the end of the process, deletes it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._places: dict[str, tuple[torch.dtype, torch.Size, int]] = {}
        size = 0
        for name, tensor in tensors.items():
            self._places[name] = (tensor.dtype, tensor.shape, size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._memory = SharedMemory(create=True, size=max(1, size))
        try:
            self.write(tensors)
        except BaseException:
            self.close()
            raise

    @property
    def segment(self) -> str:
        """The name of the segment."""
        return self._memory.name

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors in, from any device. Raises ValueError unless names, dtypes and shapes are those that the
        segment was made for."""
        given = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        if given != {name: (dtype, shape) for name, (dtype, shape, _) in self._places.items()}:
            raise ValueError("the tensors differ in name, dtype or shape from those that the segment was made for")
        for name, (dtype, shape, offset) in self._places.items():
            if shape.numel():
                view = torch.frombuffer(self._memory.buf, dtype=dtype, count=shape.numel(), offset=offset)
                view.view(shape).copy_(tensors[name])

    def message(self, lora_name: str, config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        """The body of `POST /load_lora_adapter_from_tensors`. config: as in adapter_config.json; fields: of the load
        call, such as `weight_version`. The name may be loaded already, unless `upsert` says otherwise."""
        tensors = [
            {
                "name": name,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": list(shape),
                "segment": self.segment,
                "offset": offset,
            }
            for name, (dtype, shape, offset) in self._places.items()
        ]
        body = {"lora_name": lora_name, "config_dict": dict(config), "load_format": "shared_memory"}
        return body | {"tensors": tensors, "upsert": True} | fields

    def close(self) -> None:
        """Delete the segment. Idempotent."""
        self._memory.close()
        self._memory.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
