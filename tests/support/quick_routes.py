"""FastAPI as it is, but for reading the signature of a route's function once.

Most tests of routes make an application of their own, and its hundred functions are closures of the same code every
time: what FastAPI makes of their parameters, half a millisecond each, is the same, too.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from types import FunctionType
from typing import Any

from fastapi import routing
from fastapi.dependencies.models import Dependant

Function = Callable[..., Any]
own = {name: getattr(routing, name, None) for name in ("get_dependant", "get_typed_return_annotation")}
"""What FastAPI has itself."""


def signature(function: Function) -> Any:
    """What FastAPI reads of a function: annotations and defaults, which a closure may have of its own."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    annotations = tuple((name, repr(value)) for name, value in function.__annotations__.items())
    return function.__code__, annotations, repr(function.__defaults__), repr(function.__kwdefaults__)


def dependants(read: Callable[..., Dependant]) -> Callable[..., Dependant]:
    known: dict[Any, Dependant] = {}

    def of(*, path: str, call: Function, scope: Any = None, **more: Any) -> Dependant:
        kind = None if more else signature(call)
        if kind is None:
            return read(path=path, call=call, scope=scope, **more)
        key = (path, scope, kind)
        if key not in known:
            known[key] = read(path=path, call=call, scope=scope)
        if known[key].dependencies:
            return read(path=path, call=call, scope=scope)
        lists = {f.name: list(getattr(known[key], f.name)) for f in fields(Dependant) if f.default_factory is list}
        return replace(known[key], call=call, **lists)

    return of


def annotations(read: Callable[[Function], Any]) -> Callable[[Function], Any]:
    known: dict[Any, Any] = {}

    def of(function: Function) -> Any:
        kind = signature(function)
        if kind is None:
            return read(function)
        if kind not in known:
            known[kind] = read(function)
        return known[kind]

    return of


def install() -> None:
    """A version of FastAPI that has other parts is only slower."""
    if own["get_dependant"] and own["get_typed_return_annotation"]:
        routing.get_dependant = dependants(own["get_dependant"])
        routing.get_typed_return_annotation = annotations(own["get_typed_return_annotation"])
