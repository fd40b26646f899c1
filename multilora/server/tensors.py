"""Adapters in the body of a request: `POST /load_lora_adapter_from_tensors`, SGLang's route without its pickle.

Owns the route's body, its bound, and the way of the weights from base64 into a file. A pickle can run any code, so it
is refused by name; the weights are the bytes of a .safetensors file, or lie in shared memory of this machine. What is
in them is checked by the loader. Used by `adapters.py`.
"""

import binascii
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from multilora.adapters.sources.shared_memory import SharedTensor, write_shared
from multilora.errors import BadRequest
from multilora.server.bodies import Body, Integer, LoadBody, Texts
from multilora.server.strict_route import StrictRoute

MAX_BODY_BYTES = 1 << 30
GPU_FORMATS = ("cuda_ipc", "ipc", "nccl")
"""Names of ways from GPU to GPU, which are refused: weights are checked and packed in host memory before any of them
reach the device, and nothing says when a foreign allocation is freed or written again."""
CHUNK = 1 << 20  # characters decoded at a time, a multiple of 4: each is short enough not to hold up other threads


class SharedTensorBody(Body):
    """One of the `tensors`: see `SharedTensor`."""

    where = "tensors"
    name: str
    dtype: str
    shape: list[Integer]
    segment: str
    offset: Integer = 0


class LoadTensorsBody(LoadBody):
    """As SGLang's, whose newer form has a list with one copy for each tensor-parallel rank. tensors: with
    `load_format` "shared_memory"."""

    where = "/load_lora_adapter_from_tensors"
    config_dict: dict[str, Any]
    serialized_tensors: str | None = None
    serialized_named_tensors: Texts | None = None
    tensors: list[SharedTensorBody] | None = None
    load_format: str | None = None

    def writer(self) -> Callable[[Path], None]:
        """What writes the weights as a .safetensors file. Raises BadRequest."""
        if self.load_format == "shared_memory":
            return partial(write_shared, self._shared())
        if self.load_format in GPU_FORMATS:
            raise BadRequest(
                f"load_format: {self.load_format!r}: a handle on another process's GPU memory is not opened; a "
                "trainer on the same host shares host memory: send load_format 'shared_memory', as "
                "multilora.adapter_tools.share.SharedAdapter does",
                param="load_format",
            )
        if self.load_format not in (None, "safetensors"):
            raise BadRequest(
                f"load_format: {self.load_format!r:.100}: only 'safetensors' and 'shared_memory' are read",
                param="load_format",
            )
        if self.tensors is not None:
            raise BadRequest("tensors: only with load_format 'shared_memory'", param="tensors")
        return partial(write_weights, *self._text())

    def _shared(self) -> list[SharedTensor]:
        if self.tensors is None or self.serialized_tensors is not None or self.serialized_named_tensors is not None:
            raise BadRequest(
                "tensors: load_format 'shared_memory' takes the weights from there alone", param="tensors"
            )
        return [SharedTensor(t.name, t.dtype, tuple(t.shape), t.segment, t.offset) for t in self.tensors]

    def _text(self) -> tuple[str, str]:
        """The base64 text and the name of its field. Raises BadRequest."""
        copies = self.serialized_named_tensors
        if (self.serialized_tensors is None) == (copies is None):
            raise BadRequest(
                "serialized_tensors: exactly one of it and serialized_named_tensors is required",
                param="serialized_tensors",
            )
        if self.serialized_tensors is not None:
            return self.serialized_tensors, "serialized_tensors"
        if not copies or any(copy != copies[0] for copy in copies):
            raise BadRequest(
                "serialized_named_tensors: a list of equal copies is expected", param="serialized_named_tensors"
            )
        return copies[0], "serialized_named_tensors"


def write_weights(text: str, field: str, path: Path) -> None:
    """Decode base64 `text` into a file. Raises BadRequest naming `field` for anything but a safetensors file."""
    with path.open("wb") as file:
        for start in range(0, max(1, len(text)), CHUNK):
            last = start + CHUNK >= len(text)
            data = _decoded(text[start : start + CHUNK], field, last)
            if start == 0:
                _check_format(data, field)
            file.write(data)


def _decoded(text: str, field: str, last: bool) -> bytes:
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as e:
        raise BadRequest(f"{field}: not base64: {e}", param=field) from None
    if not last and len(data) * 4 != len(text) * 3:
        raise BadRequest(f"{field}: not base64: padding before the end", param=field)
    return data


def _check_format(start: bytes, field: str) -> None:
    """Eight bytes of length and then JSON: that no pickle starts so is what tells them apart."""
    if start[8:9] == b"{":
        return
    wanted = "send the bytes of a .safetensors file (safetensors.torch.save) as base64"
    if start[:1] == b"\x80" or start[:4] == b"PK\x03\x04":
        raise BadRequest(f"{field}: pickles are refused, they can run code; {wanted}", param=field)
    raise BadRequest(f"{field}: not a safetensors file; {wanted}", param=field)


class TensorsRoute(StrictRoute):
    """A StrictRoute whose body has weights in it."""

    max_body_bytes = MAX_BODY_BYTES
    advice = ": save the adapter to a directory and load it by its path"
