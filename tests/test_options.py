"""Sizes, and an option taken apart."""

from dataclasses import dataclass

import pytest

from multilora.errors import ConfigError
from multilora.options import KeysOf, option, options_of, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("512M", 512 * 2**20),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("8 GB", 8 * 10**9),
        ("1.5g", 3 * 2**29),
        ("2KB", 2000),
        ("1TiB", 2**40),
        ("7b", 7),
        ("7iB", 7),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8XB", "-1", "1e9", "8 G i B", "0x10"])
def test_parse_size_refuses(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@dataclass(frozen=True)
class Sample:
    count: int = option(3, "how many", group="g")
    any_number: int | None = option(None, "any", group="g", low=None)
    port: int = option(0, "port", group="g", low=0, high=9)
    share: float = option(0.5, "share", group="g")
    flag: bool = option(False, "flag", group="h", aliases=("--f",))
    mode: str = option("a", "mode", group="h", choices=("a", KeysOf("multilora.logs:LEVELS")))
    width: int = option(16, "width", group="h", choices=(16, 32))
    names: tuple[str, ...] | None = option(None, "names", group="h")
    room: int | None = option(None, "room", group="h", size=True)


OPTIONS = {opt.name: opt for opt in options_of(Sample)}


def test_options_know_their_types():
    assert [(o.type, o.many, o.optional, o.choices) for o in OPTIONS.values()] == [
        (int, False, False, ()),
        (int, False, True, ()),
        (int, False, False, ()),
        (float, False, False, ()),
        (bool, False, False, ()),
        (str, False, False, ("a", "debug", "info", "warning", "error")),
        (int, False, False, (16, 32)),
        (str, True, True, ()),
        (int, False, True, ()),
    ]
    assert OPTIONS["any_number"].flag == "--any-number"
    assert OPTIONS["flag"].aliases == ("--f",)
    assert Sample() == Sample(count=3, share=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 1),
        ("any_number", None),
        ("any_number", -5),
        ("port", 9),
        ("share", 1),
        ("flag", True),
        ("mode", "info"),
        ("width", 32),
        ("names", ("x", "y")),
        ("names", None),
    ],
)
def test_good_values(name, value):
    OPTIONS[name].check(value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", 0, "--count must be a positive integer, is 0"),
        ("count", None, "--count must be a positive integer, is None"),
        ("count", True, "--count must be a positive integer, is True"),
        ("count", 1.0, "--count must be a positive integer, is 1.0"),
        ("any_number", "5", "--any-number must be an integer, is '5'"),
        ("port", 10, "--port must be an integer between 0 and 9, is 10"),
        ("share", "1", "--share must be a number, is '1'"),
        ("flag", "no", "--flag must be true or false, is 'no'"),
        ("mode", "c", "--mode must be one of a, debug, info, warning, error, is 'c'"),
        ("width", 17, "--width must be one of 16, 32, is 17"),
        ("names", ("x", 1), "--names must be text, is 1"),
        ("names", "x", "--names must be a list, is 'x'"),
    ],
)
def test_bad_values(name, value, message):
    with pytest.raises(ConfigError) as error:
        OPTIONS[name].check(value)
    assert str(error.value) == message


def test_a_table_is_imported_when_its_names_are_asked_for():
    choices = KeysOf("multilora.no_such_module:TABLE")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        assert choices.keys
    assert KeysOf("multilora.logs:LEVELS").keys == ("debug", "info", "warning", "error")
