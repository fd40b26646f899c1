"""The checks of a grammar's source before any compiler sees it: size, depth, and what would not be enforced.

Pure functions that raise BadRequest naming the field. Called by `front/grammar.py`. What a
source that passes costs to compile is bounded by the process that compiles it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from multilora.errors import BadRequest
from multilora.front.tools.definitions import schemas_in

ANY_JSON = "$$ANY$$"  # as json_schema: any JSON value
MAX_SOURCE = 1 << 20
"""Characters of one grammar."""
MAX_SCHEMAS = 10_000
"""Schemas in one JSON schema. The compiler would run into its limits with a tenth of them."""
_NOT_ENFORCED = ("not", "if", "then", "else", "dependentSchemas")
"""JSON Schema's keywords that the compiler would silently pass over."""


def check_source(field: str, source: str) -> None:
    """Raise BadRequest for a grammar that is too large, too deep, or would be enforced in part only."""
    if len(source) > MAX_SOURCE:
        raise BadRequest(
            f"sampling_params.{field} has {len(source)} characters; at most {MAX_SOURCE} are compiled", param=field
        )
    if field == "json_schema" and source != ANY_JSON:
        _check_schema(field, _read(field, source))
    elif field == "structural_tag":
        for schema in _schemas_of_tags(_read(field, source)):
            _check_schema(field, schema)


def _read(field: str, source: str) -> Any:
    try:
        return json.loads(source)  # its errors say where
    except RecursionError:
        raise unusable(field, "it is nested too deeply") from None
    except ValueError as e:
        raise unusable(field, str(e)) from None


def _schemas_of_tags(tag: Any) -> Iterator[Any]:
    """The JSON schemas in a structural tag of either form."""
    waiting = [tag]
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting += found
        elif isinstance(found, dict):
            yield from (found[key] for key in ("json_schema", "schema") if isinstance(found.get(key), dict | bool))
            waiting += [value for key, value in found.items() if key not in ("json_schema", "schema")]


def _check_schema(field: str, schema: Any) -> None:
    try:
        for number, (path, inner) in enumerate(schemas_in(schema, "the schema", 0)):
            if number == MAX_SCHEMAS:
                raise unusable(field, f"it has over {MAX_SCHEMAS} schemas in it")
            if reason := _not_enforced(inner):
                raise unusable(field, f"{path}.{reason}")
    except BadRequest as e:
        if e.param == field:
            raise
        raise unusable(field, e.message) from None


def _not_enforced(schema: Mapping[str, Any]) -> str | None:
    """What of this one schema, without those in it, no grammar would follow."""
    ref = schema.get("$ref", "#")
    if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
        return f"$ref = {ref!r:.80}: only references within the schema are served"
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        return "allOf: of several schemas is not served; write them as one"
    found = next((key for key in _NOT_ENFORCED if key in schema), None)
    return f"{found}: this keyword is not served" if found else None


def unusable(field: str, reason: str) -> BadRequest:
    """The error for a grammar that cannot be compiled."""
    return BadRequest(f"sampling_params.{field} is not a usable grammar: {reason}", param=field)
