import pytest

from multilora.errors import BadRequest
from multilora.front.adapter_spec import BASE, parse_composition, parse_specs, show

A = {"name": "a", "weight": 0.7}
B = {"name": "b"}
MIX = (("a", 0.7), ("b", 1.0))


@pytest.mark.parametrize(
    ("value", "choices"),
    [
        (None, [BASE, BASE]),
        ("a", [(("a", 1.0),)] * 2),
        ([A, B], [MIX, MIX]),  # a list of objects only: one composition for all
        ((A, B), [MIX, MIX]),
        ([B], [(("b", 1.0),)] * 2),
        (["a", None], [(("a", 1.0),), BASE]),
        ([[A, B], "a"], [MIX, (("a", 1.0),)]),
        ([[A, B], [B]], [MIX, (("b", 1.0),)]),
        ([None, [{"name": "a", "weight": -3}]], [BASE, (("a", -3.0),)]),
        ([[{"name": "a", "weight": 0}], None], [(("a", 0.0),), BASE]),
    ],
)
def test_two_items(value, choices):
    assert parse_specs(value, 2) == choices


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, r"lora_path = 5: must be a name"),
        (A, r"a composition is a list of objects"),
        ([], r"lora_path has 0 entries for 2"),
        (["a"], r"lora_path has 1 entries for 2"),
        ([A, None], r"lora_path\[0\]: a composition is a list of objects; put this one into a list of its own"),
        (["a", 7], r"lora_path\[1\] = 7"),
        ([[], "a"], r"lora_path\[0\]: an empty composition"),
        ([["a", "b"], None], r"lora_path\[0\]\[0\] = 'a': each part of a composition is \{name, weight\}"),
        ([[A, None], None], r"lora_path\[0\]\[1\] = None"),
        ([{"weight": 1.0}], r"lora_path\[0\]"),
        ([A | {"scale": 1}], r"lora_path\[0\]"),
        ([{"name": None}], r"lora_path\[0\].name = None: must be the name of an adapter; the base model is always"),
        ([A, A], r"adapter 'a' comes twice"),
        ([A | {"weight": "1"}], r"weight = '1': must be a number"),
        ([A | {"weight": True}], r"weight = True: must be a number"),
        ([A | {"weight": None}], r"weight = None: must be a number"),
        ([A | {"weight": float("nan")}], r"weight = nan: must be a finite number"),
        ([A | {"weight": float("-inf")}], r"weight = -inf: must be a finite"),
        ([A | {"weight": 1e39}], r"weight = 1e\+39: must be a finite number, at most 1e\+06"),
        ([A | {"weight": 10**400}], r"must be a finite number"),
    ],
)
def test_refused(value, message):
    with pytest.raises(BadRequest, match=message) as e:
        parse_specs(value, 2)
    assert e.value.param == "lora_path"


def test_for_people():
    assert show(parse_composition([A, B, {"name": "c", "weight": -2}])) == "0.7 * a + b + -2 * c"
