"""Structural tags: free text in which certain texts begin parts that follow a grammar.

Knows the two forms that clients send: xgrammar's own, `{"type": "structural_tag", "format": {…}}`, and SGLang's older
one, `{"structures": [{"begin", "schema", "end"}, …], "triggers": […]}`. Called by `grammars/compiler.py`.
"""

import json
from typing import Any


def xgrammar_tag(source: str) -> str:
    """The structural tag of the JSON text `source` in the form that xgrammar compiles. Raises ValueError."""
    tag = json.loads(source)
    if not isinstance(tag, dict):
        raise ValueError("a structural tag is a JSON object")
    if "structures" not in tag:
        return source
    structures, triggers = tag["structures"], tag.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise ValueError('"structures" and "triggers" are arrays')
    form = {
        "type": "triggered_tags",
        "triggers": triggers,
        "tags": [_tag(structure) for structure in structures],
        "at_least_one": bool(tag.get("at_least_one")),
    }
    return json.dumps({"type": "structural_tag", "format": form})


def json_only(schema: Any, max_whitespace: int) -> dict[str, Any]:
    """A tag for an answer that is nothing but JSON of this schema, with so much white space in one place at most."""
    content = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": max_whitespace}
    return {"type": "structural_tag", "format": content}


def _tag(structure: Any) -> dict[str, Any]:
    if not isinstance(structure, dict) or not {"begin", "end"} <= structure.keys():
        raise ValueError('each of "structures" is an object with "begin" and "end"')
    schema = structure.get("schema")
    content = {"type": "json_schema", "json_schema": {} if schema is None else schema}
    return {"type": "tag", "begin": structure["begin"], "content": content, "end": structure["end"]}
