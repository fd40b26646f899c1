"""What the names mean that clients give: the base model, or which loaded adapter, for the caller that asks.

Owns the table of current adapters, by full name (see `access.py`); its heir, `AdapterRegistry`, is the only writer.
Called by `registry.py`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from multilora.errors import BadRequest, LoraNotEnabled, UnknownAdapter, UnknownModel
from multilora.front.access import CALLER, SEPARATOR, Tenant
from multilora.front.adapter_ref import AdapterRef
from multilora.front.adapter_spec import BASE, AdapterSpec, names_in, show

MAX_NAME = 256  # characters
DEFAULT_MODEL = "default"  # what clients of SGLang write for the base model


class AdapterNames:
    """enabled: whether there may be adapters. tenants: those that may have adapters of their own."""

    def __init__(self, model_name: str, enabled: bool):
        self.model_name = model_name
        self.enabled = enabled
        self.tenants: Mapping[str, Tenant] = {}
        self._current: dict[str, AdapterRef] = {}  # LOADED or UNLOADING, in load order

    def check_name(self, name: str) -> None:
        """Raise BadRequest unless `name` can be an adapter's: any text of bounded length that cannot be taken for
        the base model or for "base:adapter". A "/" is allowed, as in the names of hub repositories. A tenant's name
        and a colon may stand before it."""
        tenant, colon, plain = name.partition(SEPARATOR)
        name = plain if colon and tenant in self.tenants else name
        if not 1 <= len(name) <= MAX_NAME:
            raise BadRequest(f"an adapter name has 1 to {MAX_NAME} characters, not {len(name)}", param="lora_name")
        if ":" in name:
            raise BadRequest(f"adapter name {name!r}: must not contain ':'", param="lora_name")
        if name in (self.model_name, DEFAULT_MODEL):
            raise BadRequest(f"adapter name {name!r}: stands for the base model", param="lora_name")

    def resolve_model(self, model: str | None, lora_path: AdapterSpec = BASE) -> AdapterSpec:
        """What a request means, whose names come from a client: by `model` ("base", "base:", "base:adapter",
        "adapter"; None or "default" is the base model) and the body's `lora_path`.

        Raises UnknownModel, UnknownAdapter, LoraNotEnabled, BadRequest.
        """
        name = self._resolve_name(model)
        by_model: AdapterSpec = BASE if name is None else ((name, 1.0),)
        if not lora_path:
            return by_model
        meant = tuple((self._full_name(part), weight) for part, weight in lora_path)
        if by_model not in (BASE, meant):
            raise BadRequest(
                f"model {model!r} and lora_path {show(lora_path)!r} name different adapters", param="lora_path"
            )
        return meant

    def known_names(self) -> Collection[str]:
        """The full names that stand for an adapter, perhaps for one that is being unloaded."""
        return self._current.keys()

    def names_of(self, model: str | None, lora_path: Any) -> list[str]:
        """The full names of adapters in a request's fields, each once. What is not well-formed, or not the caller's
        to use, is left out: it will be refused elsewhere."""
        names: list[str] = []
        if model not in (None, DEFAULT_MODEL, self.model_name):
            names.append(model.removeprefix(f"{self.model_name}:"))
        meant = (self._meant(name) for name in (*names, *names_in(lora_path)) if name)
        return list(dict.fromkeys(name for name in meant if name is not None))

    def _resolve_name(self, model: str | None) -> str | None:
        if model in (None, DEFAULT_MODEL, self.model_name):
            return None
        meant = self._meant(model)
        if meant in self._current:
            return meant
        base, colon, adapter = model.partition(":")
        if not colon or base != self.model_name:
            known = f"the base model is {self.model_name!r}"
            raise UnknownModel(
                f"model {model!r} does not exist: {known}, and no adapter has that name", param="model"
            )
        if not adapter:
            return None
        return self._full_name(adapter, param="model")

    def _meant(self, name: str) -> str | None:
        """The full name of the adapter that the caller calls `name`: its tenant's own, or else the operator's. None:
        the caller may not use such a name."""
        caller = CALLER.get()
        if not caller.may_use(name):
            return None
        own = caller.own_name(name)
        return own if own in self.known_names() else name

    def _full_name(self, name: str, *, param: str = "lora_path") -> str:
        """The same of an adapter that is loaded, perhaps being unloaded. Raises UnknownAdapter."""
        self._check_enabled(name)
        meant = self._meant(name)
        if meant not in self._current:
            raise unknown_adapter(name, param)
        assert meant is not None
        return meant

    def _check_enabled(self, name: str | None = None) -> None:
        if not self.enabled:
            wanted = f" (adapter {name!r} was asked for)" if name is not None else ""
            raise LoraNotEnabled(f"LoRA is not enabled{wanted}: start with --enable-lora", param="lora_path")


def unknown_adapter(name: str, param: str = "lora_path") -> UnknownAdapter:
    return UnknownAdapter(f"adapter {name!r} has never been loaded, or was unloaded", param=param)
