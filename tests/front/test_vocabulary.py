"""Which tokenizer and how many tokens a request has, by its adapter; what is read beside an adapter, and refused."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes.models import FakeEngineClient
from fakes.tokenizers import byte_level_tokenizer, with_added_tokens

from multilora.engine.messages import AdapterInfo
from multilora.errors import AdapterError, AdapterForbidden, AdapterInvalid, BadRequest
from multilora.front import vocabulary as own_tokens
from multilora.front.registry import AdapterRegistry
from multilora.front.vocabulary import Vocabularies, load_tokenizer, read_files
from multilora.params import SamplingParams

BASE = byte_level_tokenizer()
SIZE = BASE.vocab_size + 3  # models have more rows than tokens
CALL, END = BASE.vocab_size, BASE.vocab_size + 1
OWN = with_added_tokens(BASE, "<|call|>", eos="<|end|>")


def adapter_at(path: Path, tokenizer: Any = None) -> Path:
    """As far as this package is concerned."""
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"")
    if tokenizer is not None:
        tokenizer.hf.save_pretrained(path)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return adapter_at(tmp_path / "own", OWN)


class Loaded:
    """Vocabularies over a registry, with adapters loaded into both."""

    def __init__(self, tokenizer: Any = BASE, roots: tuple[str, ...] = ()):
        self.registry = AdapterRegistry("base", True)
        ready = FakeEngineClient(vocab_size=SIZE, eos_token_ids=(1,)).ready
        self.vocabularies = Vocabularies(tokenizer, ready, self.registry, roots)

    def load(self, name: str, path: Path | None, rows: int | None = None, trains: bool = True) -> int:
        version = self.registry.begin_load(name, str(path))
        info = AdapterInfo(
            version=version,
            path=str(path),
            rank=8,
            target_modules=[],
            nbytes=0,
            pages=0,
            vocab_size=rows,
            trains_tokens=trains,
        )
        if self.vocabularies.concerns(info):
            self.vocabularies.add(info, None if path is None else str(path))
        self.registry.commit_load(version, info)
        return version

    def of(self, *parts: tuple[str, float]) -> own_tokens.Vocabulary:
        return self.vocabularies.of(parts)


def test_the_adapter_s_tokenizer(directory: Path) -> None:
    loaded = Loaded()
    loaded.load("own", directory, SIZE + 8)
    own = loaded.of(("own", 1.0))
    assert (own.size, own.own, own.ends, own.no_text) == (SIZE + 8, True, (END,), "")
    ids = own.writer("text").encode("the cat<|call|>x<|end|>")
    assert ids[-1] == END and CALL in ids
    assert own.reader("text").decode(ids, skip_special_tokens=True) == "the cat<|call|>x"
    assert loaded.vocabularies.base.writer("text").encode("<|call|>") == BASE.encode("<|call|>") != [0, CALL]


def test_equal_files_are_loaded_once(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(own_tokens, "load_tokenizer", lambda files: calls.append(files) or load_tokenizer(files))
    loaded = Loaded()
    versions = [loaded.load(name, path) for name, path in (("a", directory), ("b", directory))]
    loaded.load("c", adapter_at(tmp_path / "same", BASE))
    loaded.load("d", tmp_path / "same")
    assert len(calls) == 2
    assert loaded.of(("a", 1.0)).tokenizer is loaded.of(("b", 1.0)).tokenizer is not BASE
    for version in versions:
        loaded.vocabularies.remove(version)
    loaded.load("e", directory)
    assert len(calls) == 3, "what nobody uses is not kept"


def test_who_has_the_base_model_s(directory: Path, tmp_path: Path) -> None:
    loaded = Loaded()
    loaded.load("own", directory)
    loaded.load("other", directory)
    loaded.load("plain", directory, trains=False)  # not even looked at
    loaded.load("bare", adapter_at(tmp_path / "bare"))
    loaded.load("same", adapter_at(tmp_path / "same", BASE))
    loaded.load("tensors", None)
    loaded.registry.compose("sum", (("own", 1.0), ("other", 1.0)))
    loaded.registry.compose("alias", (("own", 1.0),))
    base = loaded.vocabularies.base
    sums = [(("own", 0.5),), (("own", 1.0), ("other", 1.0)), (("sum", 1.0),), (("nobody", 1.0),), ()]
    for parts in [*sums, *(((name, 1.0),) for name in ("plain", "bare", "same", "tensors"))]:
        assert loaded.of(*parts) is base
    assert loaded.of(("own", 1.0)) is loaded.of(("alias", 1.0))
    assert loaded.of(("own", 1.0)) is not loaded.of(("other", 1.0))


def test_a_version_goes_with_its_tokens(directory: Path) -> None:
    loaded = Loaded()
    version = loaded.load("own", directory)
    loaded.vocabularies.remove(version)
    loaded.vocabularies.remove(version)
    assert loaded.of(("own", 1.0)) is loaded.vocabularies.base


def test_another_vocabulary_without_a_tokenizer(tmp_path: Path) -> None:
    loaded = Loaded()
    loaded.load("more", adapter_at(tmp_path / "more"), SIZE + 5)
    loaded.load("tensors", None, SIZE - 5)
    for name, size in (("more", SIZE + 5), ("tensors", SIZE - 5)):
        found = loaded.of((name, 1.0))
        assert (found.size, found.own, found.ends) == (size, True, ())
        with pytest.raises(BadRequest, match=r"text: .* send input_ids, or save the tokenizer") as caught:
            found.writer("text", "prompt")
        assert caught.value.param == "prompt"
        assert found.reader("text").decode([SIZE + 4]) == ""
        with pytest.raises(BadRequest, match=r"sampling_params\.regex: not for an adapter with tokens of its own"):
            found.check_grammar(SamplingParams(regex="a+"))
        found.check_grammar(SamplingParams())


def test_other_rows_and_the_same_tokens(tmp_path: Path) -> None:
    loaded = Loaded()
    loaded.load("padded", adapter_at(tmp_path / "padded", BASE), SIZE + 5)
    found = loaded.of(("padded", 1.0))
    assert (found.size, found.own, found.no_text, found.tokenizer) == (SIZE + 5, False, "", BASE)
    found.check_grammar(SamplingParams(regex="a+"))


def test_an_eos_beyond_the_rows_or_known_already_is_none_of_its_own(tmp_path: Path) -> None:
    loaded = Loaded()
    loaded.load("cut", adapter_at(tmp_path / "cut", OWN), END)
    loaded.load("known", adapter_at(tmp_path / "known", with_added_tokens(BASE, "<|call|>")))
    assert loaded.of(("cut", 1.0)).ends == loaded.of(("known", 1.0)).ends == ()


def test_without_the_base_model_s_tokenizer(directory: Path) -> None:
    loaded = Loaded(None)
    loaded.load("own", directory, SIZE + 8)
    assert (loaded.of(("own", 1.0)).tokenizer, loaded.of(("own", 1.0)).size) == (None, SIZE + 8)
    with pytest.raises(BadRequest, match="text needs a tokenizer, and --skip-tokenizer-init is set"):
        loaded.of(("own", 1.0)).writer("text")


def test_chat_templates(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "x"}]
    own = with_added_tokens(BASE, "<|call|>")
    own.hf.chat_template = "{{ messages[0]['content'] }}<|call|>"
    path = adapter_at(tmp_path / "own", own)
    loaded = Loaded()
    loaded.load("own", path)
    assert loaded.of(("own", 1.0)).writer("chat").encode_chat(message) == BASE.encode_chat(message)
    untold = with_added_tokens(BASE)
    untold.hf.chat_template = None
    bare = Loaded(untold)
    bare.load("own", path)
    assert bare.of(("own", 1.0)).writer("chat").encode_chat(message)[-1] == CALL


def change(name: str, text: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(text)


def configured(**fields: Any) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        file = path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return write


def a_pipe(path: Path) -> None:
    (path / "added_tokens.json").unlink(missing_ok=True)
    os.mkfifo(path / "added_tokens.json")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (change("tokenizer.json", '{"version": "1.0", '), "tokenizer of the adapter cannot be loaded"),
    "empty": (change("tokenizer.json", ""), "tokenizer of the adapter cannot be loaded"),
    "a list": (change("tokenizer.json", "[]"), "tokenizer of the adapter cannot be loaded"),
    "config a list": (change("tokenizer_config.json", "[]"), "tokenizer of the adapter cannot be loaded"),
    "deep": (change("tokenizer_config.json", "[" * 100_000), "tokenizer of the adapter cannot be loaded"),
    "types": (configured(added_tokens_decoder={"1": 3}), "tokenizer of the adapter cannot be loaded"),
    "remote code": (
        configured(auto_map={"AutoTokenizer": ["evil.Tok", None]}, tokenizer_class="Evil"),
        "tokenizer of the adapter cannot be loaded",
    ),
    "large": (lambda path: os.truncate(path / "tokenizer.json", (64 << 20) + 1), "tokenizer.json: 67108865 bytes"),
    "a pipe": (a_pipe, "added_tokens.json: not a regular file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_fails_by_name(name: str, directory: Path) -> None:
    spoil, message = BROKEN[name]
    spoil(directory)
    loaded = Loaded()
    with pytest.raises(AdapterInvalid) as caught:
        loaded.load("own", directory)
    assert message in caught.value.message
    assert "multilora-tokenizer-" not in caught.value.message  # where it was copied to
    assert loaded.of(("own", 1.0)) is loaded.vocabularies.base


def test_code_beside_an_adapter_never_runs(directory: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (directory / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    configured(auto_map={"AutoTokenizer": ["evil.Tok", "evil.Tok"]})(directory)
    with contextlib.suppress(AdapterError):
        load_tokenizer(read_files(str(directory)))
    assert not mark.exists()


def test_no_tokenizer_file_is_no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    assert read_files(str(directory)) == {}


def test_nothing_outside_the_roots(directory: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "own").rename(root / "own")
    assert read_files(str(root / "own"), (str(root),))
    (root / "own" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (root / "own" / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert read_files(str(root / "own"))
    with pytest.raises(AdapterForbidden, match=r"'tokenizer\.json' in adapter path"):
        read_files(str(root / "own"), (str(root),))


def test_a_full_disk_is_not_the_adapters_fault(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_bytes(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    files = read_files(str(directory))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(AdapterError, match="could not be kept: No space left") as caught:
        load_tokenizer(files)
    assert not isinstance(caught.value, AdapterInvalid)
