"""The loaded adapters as the present caller may see them: under its own names, and no others.

Knows no wire format; the routes that list adapters show what is here. Called by `server/`.
"""

from dataclasses import dataclass

from multilora.front.access import CALLER, Caller
from multilora.front.adapter_ref import AdapterRef
from multilora.front.adapter_spec import show
from multilora.front.registry import AdapterRegistry


@dataclass(frozen=True)
class SeenAdapter:
    """name: the caller's word for it. path: where it comes from; its name, where that is not the caller's affair."""

    name: str
    path: str
    ref: AdapterRef


def seen_adapters(registry: AdapterRegistry) -> list[SeenAdapter]:
    """The adapters that take requests, in load order. A tenant's own one hides the operator's of the same name."""
    caller = CALLER.get()
    found: dict[str, AdapterRef] = {}
    for ref in registry.refs():
        name = caller.shown(ref.name)
        if caller.sees(ref.name) and (name not in found or caller.owns(ref.name)):
            found[name] = ref
    open_paths = caller.admin or not registry.tenants
    return [
        SeenAdapter(name, _path(ref, caller) if open_paths or caller.owns(ref.name) else name, ref)
        for name, ref in found.items()
    ]


def _path(ref: AdapterRef, caller: Caller) -> str:
    return show(tuple((caller.shown(part), weight) for part, weight in ref.parts)) if ref.parts else ref.path


def seen_paths(registry: AdapterRegistry) -> dict[str, str]:
    """Name → path of these adapters."""
    return {adapter.name: adapter.path for adapter in seen_adapters(registry)}
