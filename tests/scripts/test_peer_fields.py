"""Reading fields from classes in wheels: bases, aliases, defaults of all kinds."""

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "peer_fields.py"

BASE = """
LIMIT = 1 << 4
class Base(BaseModel):
    inherited: int = LIMIT
    changed: int = 1
"""
BODY = '''
from typing import ClassVar
from .base import LIMIT, Base as B
from elsewhere import Other
NAME: str = "default"

class Body(B, Other, Generic[T]):
    """Text."""

    required: str
    also_required: int = Field(..., ge=0)
    limits_only: list[int] = Field(min_length=1)
    changed: int = 2
    text: str = NAME
    limit: int = LIMIT
    low: float = -0.5
    items: list = Field(default_factory=list, description="x")
    first: int | None = Field(None, ge=1)
    named: dict = Field(alias="schema", default={})
    made: str = Field(default_factory=lambda: uuid())
    kind: Kind = Kind.A
    counter: ClassVar[int] = 0
    hidden: int = PrivateAttr(default=1)
    inner: int = field(default=1, init=False)
    _private: int = 1

    def method(self) -> int:
        local: int = 3
        return local
'''


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("peer_fields", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheels(tmp_path, script, monkeypatch):
    with zipfile.ZipFile(tmp_path / "peer-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/base.py", BASE)
        wheel.writestr("peer/body.py", BODY)
    monkeypatch.setattr(script, "BODIES", [("peer/body.py", "/route", "Body")])
    return tmp_path


def test_every_kind_of_field(script, wheels):
    data = script.read_bodies(wheels)
    assert data["peers"] == {"peer": "1.2"}
    (body,) = data["bodies"]
    assert (body["peer"], body["route"], body["class"], body["file"]) == ("peer", "/route", "Body", "peer/body.py")
    fields = body["fields"]
    assert list(fields) == sorted(fields)
    assert {name for name, facts in fields.items() if facts.get("required")} == {
        "required",
        "also_required",
        "limits_only",
    }
    assert {name for name, facts in fields.items() if facts.get("computed")} == {"made", "kind"}
    assert {name: facts["default"] for name, facts in fields.items() if "default" in facts} == {
        "inherited": 16,
        "changed": 2,
        "text": "default",
        "limit": 16,
        "low": -0.5,
        "items": [],
        "first": None,
        "schema": {},
    }


def test_lines_lead_to_the_source(script, wheels):
    fields = script.read_bodies(wheels)["bodies"][0]["fields"]
    for name, facts in fields.items():
        source = {"peer/base.py": BASE, "peer/body.py": BODY}[facts.get("file", "peer/body.py")]
        line = source.splitlines()[facts["line"] - 1]
        assert name in line
    assert fields["inherited"]["class"] == "Base"


def test_a_class_that_lost_its_fields_is_noticed(script, wheels, monkeypatch):
    monkeypatch.setattr(script.Peers, "fields", lambda *args: iter(()))
    with pytest.raises(SystemExit, match="was it moved"):
        script.read_bodies(wheels)


def test_the_output_has_a_line_for_each_field(script, wheels, capsys, monkeypatch):
    monkeypatch.setattr(script.sys, "argv", ["peer_fields", str(wheels)])
    script.main()
    text = capsys.readouterr().out
    assert json.loads(text) == script.read_bodies(wheels)
    line = '"inherited": {"class": "Base", "file": "peer/base.py", "line": 4, "default": 16},'
    assert line in [found.strip() for found in text.splitlines()]
