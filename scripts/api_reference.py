"""Writes docs/reference.md, every route with its parameters, body, answer and key, from the app's OpenAPI document.

    python scripts/api_reference.py [--url http://localhost:30000]

Run it after a route or a field has changed; a test fails until then. Without --url the document is that of the
application around the tests' fake engine.
"""

import argparse
import json
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference.md"
HEAD = """# API reference

Written by `scripts/api_reference.py` from what the server says of itself at `/openapi.json`.
[api.md](api.md) explains it, and says where other servers differ. Routes that stand in one heading are the same.
Every route can answer with [errors](api.md#errors).
"""
KEYS = {
    "apiKey": "an API key",
    "adminKey": "the admin key",
    "metricsKey": "the metrics key or the admin key",
    None: "none",
}
"""What a route asks for where keys are set, by the name of the scheme."""

Node = dict[str, Any]


def rendered(document: Node) -> str:
    """The page."""
    lines = [HEAD]
    for names, operation in routes(document):
        lines += [f"## {', '.join(names)}", "", *section(operation), ""]
    lines += ["# Objects", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += [f"## {name}", "", *described(schema), *fields(schema), ""]
    return "\n".join(lines).rstrip() + "\n"


def routes(document: Node) -> Iterator[tuple[list[str], Node]]:
    """Operations in the document's order; those that are the same but for their path or method come once."""
    found: dict[str, tuple[list[str], Node]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            key = json.dumps({k: v for k, v in operation.items() if k != "operationId"}, sort_keys=True)
            found.setdefault(key, ([], operation))[0].append(f"{method.upper()} {path}")
    yield from found.values()


def section(operation: Node) -> list[str]:
    """What one operation does, takes and answers."""
    lines = [" ".join(operation.get("description", "").split()), ""]
    parameters = operation.get("parameters", [])
    if parameters:
        lines += ["| parameter | in | type | default |", "|---|---|---|---|"]
        lines += [
            f"| `{p['name']}` | {p['in']} | {cell(p['schema'])} | {default(p, p['schema'])} |" for p in parameters
        ]
        lines.append("")
    bodies = operation.get("requestBody", {}).get("content", {}).values()
    answers = operation["responses"]["200"].get("content", {}).items()
    facts = [f"- body: {kind(body['schema'])}" for body in bodies]
    facts += [f"- answers `{media}`: {kind(answer['schema'])}" for media, answer in answers]
    security = [name for scheme in operation.get("security", []) for name in scheme]
    facts.append(f"- key: {KEYS[security[0] if security else None]}")
    return lines + facts


def described(schema: Node) -> list[str]:
    text = " ".join(schema.get("description", "").split())
    return [text, ""] if text else []


def fields(schema: Node) -> list[str]:
    """A table of an object's fields."""
    properties = schema.get("properties", {})
    if not properties:
        return ["No fields."]
    lines = ["| field | type | default | |", "|---|---|---|---|"]
    for name, node in properties.items():
        required = {"required": name in schema.get("required", ())}
        meaning = " ".join(node.get("description", "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {cell(node)} | {default(required, node)} | {meaning} |")
    if schema.get("additionalProperties") not in (None, False):
        lines += ["", "Other fields are taken, too."]
    return lines


def default(owner: Node, node: Node) -> str:
    if owner.get("required"):
        return "required"
    return f"`{json.dumps(node['default'])}`" if node.get("default") not in (None, [], {}) else ""


def cell(node: Node) -> str:
    """A type inside of a table."""
    return kind(node).replace("|", "\\|")


def kind(node: Node) -> str:
    """A schema in words: `integer from 0 to 20, or null`."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in node:
            return either(kind(option) for option in node[key])
    if "enum" in node:
        return either(f"`{json.dumps(value)}`" for value in node["enum"])
    if "const" in node:
        return f"`{json.dumps(node['const'])}`"
    types = node.get("type", "anything")
    if isinstance(types, list):
        return either(kind(node | {"type": one}) for one in types)
    if types == "array":
        return f"list of {grouped(node['items'])}" if node.get("items") else "list"
    if types == "object" and isinstance(node.get("additionalProperties"), dict) and node["additionalProperties"]:
        return f"object of {grouped(node['additionalProperties'])}"
    return str(types) + bounds(node, types)


def grouped(node: Node) -> str:
    """`kind`, in brackets where it has alternatives."""
    text = kind(node)
    return f"({text})" if " or " in text else text


def bounds(node: Node, name: str) -> str:
    if name not in ("integer", "number"):
        return ""
    words = {"minimum": "from", "exclusiveMinimum": "over", "maximum": "to", "exclusiveMaximum": "under"}
    return "".join(f" {word} {node[key]}" for key, word in words.items() if key in node)


def either(options: Iterable[str]) -> str:
    """The alternatives, null last."""
    found = dict.fromkeys(options)
    return " or ".join(sorted(found, key=lambda option: option == "null"))


def document(url: str | None) -> Node:
    """The OpenAPI document of a server, or of the application itself."""
    if url is not None:
        with urllib.request.urlopen(f"{url}/openapi.json", timeout=60) as answer:
            found: Node = json.load(answer)
            return found
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    from fakes.models import FakeEngineClient
    from fakes.server_app import LocalServer

    return dict(LocalServer(FakeEngineClient(), None).app.openapi())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=None)
    PAGE.write_text(rendered(document(parser.parse_args().url)))


if __name__ == "__main__":
    main()
