"""docs/reference.md is what `scripts/api_reference.py` writes from the application's OpenAPI document."""

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer

from scripts.api_reference import PAGE, document, fields, kind, rendered, routes


@pytest.fixture(scope="module")
def openapi():
    return LocalServer(FakeEngineClient(), None).app.openapi()


def test_the_page_is_up_to_date(openapi):
    """If not: python scripts/api_reference.py"""
    assert PAGE.read_text() == rendered(openapi)


def test_every_operation_is_there_once(openapi):
    named = [name for names, _ in routes(openapi) for name in names]
    assert len(named) == len(set(named)) == sum(len(operations) for operations in openapi["paths"].values())
    assert "## POST /v1/rerank" not in rendered(openapi)  # stands behind /rerank, which is the same
    assert "## POST /rerank, POST /v2/rerank, POST /v1/rerank\n" in rendered(openapi)


def test_types_in_words():
    assert kind({"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 20}]}) == (
        "integer from 0 to 20 or null"
    )
    assert kind({"type": "array", "items": {"$ref": "#/components/schemas/Error"}}) == "list of [Error](#error)"
    nullable = {"type": "array", "items": {"type": ["integer", "null"]}}
    assert kind({"anyOf": [nullable, {"type": "null"}]}) == "list of (integer or null) or null"
    assert kind({"type": ["string", "null"]}) == "string or null"
    assert kind({"enum": ["a", 1]}) == '`"a"` or `1`'
    assert kind({"type": "object", "additionalProperties": {"type": "string"}}) == "object of string"
    assert kind({}) == "anything" and kind({"const": 1}) == "`1`"


def test_fields():
    schema = {
        "required": ["a"],
        "properties": {"a": {"type": "string", "description": "x|y"}, "b": {"type": "boolean", "default": True}},
    }
    assert fields(schema)[2:] == ["| `a` | string | required | x\\|y |", "| `b` | boolean | `true` |  |"]
    assert fields({"type": "object"}) == ["No fields."]


def test_the_document_can_be_had_without_a_server(openapi):
    assert document(None).keys() == openapi.keys()
