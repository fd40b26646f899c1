"""Adapters of an `LLM` by name: loaded one by one or side by side, from directories or from tensors, and unloaded.

Keeps registry, vocabularies, spool and engine in step: what fails halfway leaves none of them changed. The server's
counterpart is `server/adapters.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from multilora.adapters.sources.spool import TENSOR_ROOT, Spool
from multilora.engine.messages import AdapterInfo, LoadAdapter, Reply, UnloadAdapter
from multilora.engine.process.local import LocalEngine
from multilora.errors import BadRequest, MultiloraError, from_wire
from multilora.front.registry import AdapterRegistry
from multilora.front.vocabulary import Vocabularies


class LocalAdapters:
    """What each method does and raises is said at `LLM`, which hands its arguments on."""

    def __init__(self, local: LocalEngine, registry: AdapterRegistry, vocabularies: Vocabularies, spool: Spool):
        self._local = local
        self._registry = registry
        self._vocabularies = vocabularies
        self._spool = spool

    def load(self, lora_name: str, lora_path: str, pinned: bool = False) -> AdapterInfo:
        version = self._registry.begin_load(lora_name, lora_path, pinned)
        try:
            info = self._local.call(LoadAdapter(call=version, version=version, path=lora_path, pinned=pinned)).info
            assert info is not None
            self._add_tokens(info, lora_path)
        except BaseException:
            self._registry.fail_load(version)
            raise
        self._registry.commit_load(version, info)
        return info

    def load_several(self, lora_paths: Mapping[str, str]) -> dict[str, AdapterInfo]:
        paths: dict[int, str] = {}  # by version
        errors: list[MultiloraError] = []
        replies: dict[int, Reply] = {}
        for name, path in lora_paths.items():
            try:
                version = self._registry.begin_load(name, path)
            except MultiloraError as e:
                errors.append(e)
            else:
                paths[version] = path
                self._local.engine.handle(LoadAdapter(call=version, version=version, path=path, pinned=False))
        while len(replies) < len(paths):
            replies |= {r.call: r for r in self._local.step() if isinstance(r, Reply)}
        for version in paths:
            reply = replies[version]
            try:
                if reply.info is None:
                    raise from_wire(reply.kind, reply.message)
                self._add_tokens(reply.info, paths[version])
            except MultiloraError as e:
                self._registry.fail_load(version)
                errors.append(e)
            else:
                self._registry.commit_load(version, reply.info)
        if errors:
            raise errors[0]
        return {name: info for name, v in zip(lora_paths, paths, strict=True) if (info := replies[v].info)}

    def load_from_tensors(
        self, lora_name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any], pinned: bool = False
    ) -> AdapterInfo:
        version = self._registry.begin_load(lora_name, TENSOR_ROOT, pinned)
        try:
            path = str(self._spool.add(version, config, lambda path: _save(tensors, path)))
            info = self._local.call(LoadAdapter(call=version, version=version, path=path, pinned=pinned)).info
            assert info is not None
            self._add_tokens(info, None)
        except BaseException:
            self._registry.fail_load(version)
            self._spool.remove(version)
            raise
        self._registry.commit_load(version, info)
        return info

    def unload(self, lora_name: str) -> None:
        version = self._registry.begin_unload(lora_name)
        if not self._registry.is_composition(version):
            self._local.call(UnloadAdapter(version, version))
        self._registry.finish_unload(version)
        self._spool.remove(version)
        self._vocabularies.remove(version)

    def _add_tokens(self, info: AdapterInfo, path: str | None) -> None:
        """The last step of a load that went well so far: if it fails, the engine forgets the adapter."""
        try:
            if self._vocabularies.concerns(info):
                self._vocabularies.add(info, path)
        except BaseException:
            self._local.call(UnloadAdapter(info.version, info.version))
            raise


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    except (AttributeError, TypeError, ValueError, RuntimeError) as e:  # no tensor, or one that is sparse, meta, …
        raise BadRequest(f"tensors: cannot be written as a .safetensors file: {e}", param="tensors") from e
    path.write_bytes(data)
