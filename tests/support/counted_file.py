"""An open safetensors file that counts the bytes it gives out."""

from typing import Any

import torch


class Counted:
    """read: the bytes that were given out of each tensor, by its name; changed in place."""

    def __init__(self, file: Any, read: dict[str, int]):
        self._file = file
        self._read = read

    def __enter__(self) -> "Counted":
        self._file.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)

    def keys(self) -> Any:
        return self._file.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._noted(name, self._file.get_tensor(name))

    def get_slice(self, name: str) -> Any:
        inner, noted = self._file.get_slice(name), self._noted

        class Slice:
            get_shape, get_dtype = inner.get_shape, inner.get_dtype

            def __getitem__(self, key: Any) -> torch.Tensor:
                return noted(name, inner[key])

        return Slice()

    def _noted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self._read[name] = self._read.get(name, 0) + tensor.nbytes
        return tensor
