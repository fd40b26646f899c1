"""Adapters below a directory by a client's name: nothing outside is ever found, whatever the name."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from multilora.adapters.sources import inside
from multilora.adapters.sources.inside import find_inside


def adapter(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"")
    return path


def build(top: Path) -> Path:
    """A root with adapters, links that stay inside, and links that lead out; beside it a secret adapter."""
    root = top / "root"
    adapter(root / "good")
    adapter(root / "org" / "deep")
    adapter(root / "ünïcode")
    adapter(top / "secret")
    adapter(top / "root2")
    (root / "link").symlink_to("good")
    (root / "out").symlink_to(top / "secret")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    (root / "chain").symlink_to("out")
    leak = adapter(root / "leak")
    (leak / "adapter_model.safetensors").unlink()
    (leak / "adapter_model.safetensors").symlink_to(top / "secret" / "adapter_model.safetensors")
    config = adapter(root / "leaky_config")
    (config / "adapter_config.json").unlink()
    (config / "adapter_config.json").symlink_to(top / "secret" / "adapter_config.json")
    (root / "empty").mkdir()
    (root / "file").write_text("{}")
    (root / "config_is_a_directory" / "adapter_config.json").mkdir(parents=True)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("top"))


@pytest.mark.parametrize(
    ("name", "real"), [("good", "good"), ("org/deep", "org/deep"), ("ünïcode", "ünïcode"), ("link", "good")]
)
def test_what_lies_inside_is_found_by_its_real_path(root: Path, name: str, real: str) -> None:
    assert find_inside(str(root), name) == root.resolve() / real


ABSENT = ["nothing", "empty", "file", "file/x", "org", "config_is_a_directory", "loop", "x" * 300, "d/" * 3000 + "x"]
ESCAPES = [
    "",
    ".",
    "./",
    "..",
    "../secret",
    "../root2",
    "../root/good",
    "good/../../secret",
    "up",
    "up/secret",
    "out",
    "chain",
    "leak",
    "leaky_config",
    "/etc",
    "//etc",
    "good\0",
    "good\0/../../secret",
    "\ud800",
    "~",
    "~root",
    "$HOME",
]


@pytest.mark.parametrize("name", ABSENT + ESCAPES, ids=lambda name: ascii(name[:30]))
def test_everything_else_is_not_there(root: Path, name: str) -> None:
    assert find_inside(str(root), name) is None


def test_an_absolute_path_into_the_root_is_no_name(root: Path) -> None:
    assert find_inside(str(root), str(root / "good")) is None


def test_the_root_itself_may_be_a_link_or_be_missing_or_lie_at_home(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "to_root").symlink_to(root)
    assert find_inside(str(tmp_path / "to_root"), "good") == root.resolve() / "good"
    assert find_inside(str(tmp_path / "to_root") + "/", "out") is None
    assert find_inside(str(tmp_path / "nowhere"), "good") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_inside("~/to_root", "good") == root.resolve() / "good"


def test_the_root_is_no_adapter_even_if_it_looks_like_one(tmp_path: Path) -> None:
    adapter(tmp_path)
    (tmp_path / "self").symlink_to(".")
    assert find_inside(str(tmp_path), "self") is None


def test_a_directory_that_may_not_be_read_is_not_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert find_inside(str(root), "good") is None


def test_another_spelling_on_a_file_system_that_takes_it_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that does not tell upper from lower case: both spellings lead to one directory."""
    exists, samefile, realpath, here = os.path.exists, os.path.samefile, os.path.realpath, root.resolve()

    def lower(path: "str | os.PathLike[str]") -> str:
        head, tail = os.path.split(os.fspath(path))
        return os.path.join(head, tail.lower()) if tail == "GOOD" else os.fspath(path)

    monkeypatch.setattr(inside.os.path, "realpath", lambda path: realpath(lower(path)))
    monkeypatch.setattr(inside.os.path, "exists", lambda path: exists(lower(path)))
    monkeypatch.setattr(inside.os.path, "samefile", lambda a, b: samefile(lower(a), lower(b)))
    assert find_inside(str(root), "GOOD") is None
    assert find_inside(str(root), "good") == here / "good"


fragments = st.sampled_from(
    ["good", "org", "deep", "link", "out", "up", "leak", "..", ".", "", "/", "//", "\\", "\0", "~", "secret", "root"]
    + ["root2", "%2e%2e", "‥", "．．", "é", "\ud800", "\n", " ", "chain", "loop", "a" * 256]
)
names = st.one_of(
    st.lists(fragments, max_size=12).map("/".join), st.lists(fragments, max_size=8).map("".join), st.text(max_size=30)
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=names)
@example(name="good/../up/root/good")
def test_no_name_escapes(root: Path, name: str) -> None:
    found = find_inside(str(root), name)
    if found is not None:
        assert found != root.resolve()
        assert found.is_relative_to(root.resolve())
        assert found == found.resolve()
        for file in found.iterdir():
            assert file.resolve().is_relative_to(root.resolve())
        assert (found / "adapter_config.json").is_file()
