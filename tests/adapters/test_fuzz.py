"""Adapters that are broken in every way we could think of, and in some thousand more, against a running engine.

Each is loaded by the real loader into the engine's own store. It must end in exactly one typed error that says where,
or load; either way an adapter that was there before answers as before, and memory's books balance.
"""

import json
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multilora import LLM
from multilora.adapters.loading.loader import InlineLoader
from multilora.adapters.peft.fields import HARMLESS, REFUSED, USED
from multilora.engine.build import build_engine
from multilora.errors import AdapterError, BadRequest, MultiloraError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # Python's, of odd regular expressions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PROMPT = [5, 6, 7, 8]
GREEDY = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}
SAYS_WHERE = re.compile(r"adapter_config\.json|\.safetensors|/bad: \S+")
CHECK_EVERY = 50  # loads, and then the answers are looked at

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 6}},
    "rich": {
        "r": 2,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": ["k_proj", "up_proj"],
        "modules_to_save": ["lm_head", "input_layernorm"],
    },
    "table": {"r": 3, "target_modules": ["embed_tokens", "o_proj"], "lora_bias": False},
    "tokens": {"r": 2, "target_modules": ["gate_proj"], "trainable_token_indices": [3, 9]},
}


@dataclass(frozen=True)
class Files:
    """An adapter's two files, the weights taken apart."""

    config: dict[str, Any]
    header: dict[str, Any]
    data: bytes

    @classmethod
    def read(cls, folder: Path) -> "Files":
        raw = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        return cls(json.loads((folder / CONFIG).read_text()), json.loads(raw[8 : 8 + length]), raw[8 + length :])

    @property
    def weights(self) -> bytes:
        text = json.dumps(self.header).encode()
        return len(text).to_bytes(8, "little") + text + self.data

    @property
    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]


class Bench:
    """A running engine with one good adapter, and a folder for bad ones."""

    def __init__(self, path: Path):
        make_tiny_model(path / "model", vocab_size=40, num_hidden_layers=2, hidden_size=16, intermediate_size=24)
        self.files: dict[str, Files] = {}
        for seed, (name, config) in enumerate(ADAPTERS.items()):
            make_adapter(path / name, path / "model", seed=seed, **config)
            self.files[name] = Files.read(path / name)
        self.folder = path / "bad"
        self.good = str(path / "plain")
        paths = {"good": self.good, "rich": str(path / "rich")}
        options: dict[str, Any] = {"skip_tokenizer_init": True, "device": "cpu", "max_total_tokens": 4096}
        self.llm = LLM(str(path / "model"), lora_paths=paths, **options)
        self.expected = self.answers()
        self.resident = self.llm.stats().adapter_pages
        self.loads = self.refused = 0

    def answers(self, *also: str) -> list[list[int]]:
        names = ["good", None, "rich", *also]
        return [answer.token_ids for answer in self.llm.generate([PROMPT] * len(names), GREEDY, names)]

    def write(self, config: bytes, weights: bytes) -> Path:
        self.folder.mkdir(exist_ok=True)
        (self.folder / CONFIG).write_bytes(config)
        (self.folder / WEIGHTS).write_bytes(weights)
        return self.folder

    def load(self, path: str, name: str = "bad") -> MultiloraError | None:
        """The error, checked; None: it loaded, answered, and is unloaded again."""
        self.loads += 1
        error: MultiloraError | None = None
        try:
            self.llm.load_lora_adapter(name, path)
        except (AdapterError, BadRequest) as e:
            error = e
            self.refused += 1
        else:
            if self.loads % CHECK_EVERY == 0:
                self.try_answers(name)
            self.llm.unload_lora_adapter(name)
        self.check()
        if error is not None:
            check_message(error)
        return error

    def load_files(self, files: Files) -> MultiloraError | None:
        return self.load(str(self.write(json.dumps(files.config).encode(), files.weights)))

    def try_answers(self, name: str) -> None:
        """A bad adapter's numbers may be so large that its own request fails, but no other's."""
        try:
            assert self.answers(name)[:3] == self.expected
        except MultiloraError:
            assert self.answers() == self.expected

    def check(self) -> None:
        self.llm.engine.check()
        assert set(self.llm.loaded_adapters()) == {"good", "rich"}
        if self.loads % CHECK_EVERY == 0:
            assert self.answers() == self.expected
        assert self.llm.stats().adapter_pages == self.resident


def check_message(error: MultiloraError) -> None:
    """One line that can be sent, printed and logged, and that fits a screen."""
    assert error.status == 400
    assert type(error) is not AdapterError, error.message
    assert error.message.isprintable() and error.message.encode(), error.message
    assert len(error.message) < 1500


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))
        patch.setenv("HF_HUB_OFFLINE", "1")  # some paths look like hub ids, which a process of its own looks for
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        bench = Bench(tmp_path_factory.mktemp("fuzz"))
        yield bench
        assert bench.answers() == bench.expected
        assert bench.refused > 0
        bench.llm.close()
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _count_the_files(bench: Bench, record_property: Callable[[str, object], None]) -> Iterator[None]:
    """The summary at the end says how many adapters were read, and how many of them were refused."""
    loads, refused = bench.loads, bench.refused
    yield
    record_property("counted", {"adapters read": bench.loads - loads, "of them refused": bench.refused - refused})


TIMES = float(os.environ.get("MULTILORA_FUZZ_TIMES", "0.5"))


def cases(count: int) -> Callable[[Any], Any]:
    """As many examples, the same ones in every run; `make fuzz` wants more."""
    return settings(
        max_examples=int(count * TIMES),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


# ---------------------------------------------------------------------- what may stand in a file

NASTY_TEXTS = (
    "", " ", ".", "..", "/", "../x", "a/b", "/etc/passwd", "\0", "\n", "\x1b[2J", "\u202e", "\ud800", "\ufeff",
    "é" * 99,
    "x" * 5000, "q_proj", "Q_PROJ", "q_proj\n", "layers.0", "all-linear", "lora_only", "default", "None", "8", "true",
    "*", "(", "[", "[[a]", "\\", "(?i)q", "(?P<x>q)(?P<x>q)", "a{65537}", "(a{999}){999}", "(?R)", "(?<=a*)b", ".*",
    "model.layers.0.self_attn.q_proj", "lm_head", "embed_tokens", "pissa", "PISSA_niter_2", "gaussian", "LORA",
    "LOHA",
)  # fmt: skip
NASTY_NUMBERS = (
    0, -1, 1, 2, 3, 4, 40, 41, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 1e-320, 1e308, -8.0, 4.0,
    4.5, float("nan"), float("inf"), float("-inf"), True, False,
)  # fmt: skip
texts = st.sampled_from(NASTY_TEXTS) | st.text(max_size=12)
numbers = st.sampled_from(NASTY_NUMBERS) | st.integers() | st.floats()
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
known_fields = st.sampled_from(sorted(USED | HARMLESS | REFUSED.keys()))
adapters = st.sampled_from(sorted(ADAPTERS))
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "C64", "f32", "", "F32 ")


# ---------------------------------------------------------------------- the config


def test_the_adapters_are_good(bench: Bench) -> None:
    for files in bench.files.values():
        assert bench.load_files(files) is None


@cases(400)
@given(name=adapters, changes=st.dictionaries(known_fields, values, min_size=1, max_size=2))
def test_fields_of_any_value(bench: Bench, name: str, changes: dict[str, Any]) -> None:
    files = bench.files[name]
    error = bench.load_files(replace(files, config=files.config | changes))
    if error is not None:
        assert SAYS_WHERE.search(error.message), error.message
        named = [field for field in changes if field in error.message]
        assert named or "tensor '" in error.message or "module" in error.message, (changes, error.message)


@cases(200)
@given(field=texts, value=values)
def test_unknown_fields(bench: Bench, field: str, value: Any) -> None:
    files = bench.files["plain"]
    if field in USED | HARMLESS | REFUSED.keys():
        return
    error = bench.load_files(replace(files, config=files.config | {field: value}))
    assert (error is None) == (not value)
    assert error is None or f"{CONFIG}: field " in error.message


@cases(200)
@given(name=adapters, field=known_fields)
def test_fields_left_out(bench: Bench, name: str, field: str) -> None:
    files = bench.files[name]
    error = bench.load_files(replace(files, config={k: v for k, v in files.config.items() if k != field}))
    assert error is None or SAYS_WHERE.search(error.message)


@cases(300)
@given(value=values | st.dictionaries(known_fields, values, max_size=5))
def test_any_json_as_the_config(bench: Bench, value: Any) -> None:
    error = bench.load(str(bench.write(json.dumps(value).encode(), bench.files["plain"].weights)))
    assert error is not None and CONFIG in error.message


@cases(400)
@given(data=st.data())
def test_a_config_with_bytes_changed(bench: Bench, data: st.DataObject) -> None:
    text = json.dumps(bench.files["plain"].config).encode()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 8)) | st.just(len(text)))
    changed = text[:start] + data.draw(st.binary(max_size=8)) + text[end:]
    error = bench.load(str(bench.write(changed, bench.files["plain"].weights)))
    assert error is None or SAYS_WHERE.search(error.message), error


HUGE = {
    "10 MB of regex": {"target_modules": "a|" * 5_000_000},
    "500 KB of regex": {"target_modules": "a|" * 250_000},
    "60 KB of regex": {"target_modules": "a|" * 30_000 + "b"},
    "regex that explodes": {"target_modules": "((((q{1000}){1000}){1000}){1000})"},
    "regex that never ends": {"target_modules": r"(?:[\w.]+\.?)+(?:[\w.]+\.?)+(?:[\w.]+\.?)+!"},
    "nested regex": {"target_modules": "(" * 5000 + "a" + ")" * 5000},
    "keys by the thousand": {"rank_pattern": {f"(x{i}|y)": 4 for i in range(20_000)}},
    "a name of 500 KB": {"target_modules": ["q_proj" * 80_000]},
    "layers by the thousand": {"layers_to_transform": list(range(2, 100_000))},
    "a digit too many": {"r": int("9" * 4000)},
}


@pytest.mark.parametrize("changes", HUGE.values(), ids=HUGE)
def test_sizes_that_would_hold_up_the_loader(bench: Bench, changes: dict[str, Any]) -> None:
    files = bench.files["plain"]
    error = bench.load_files(replace(files, config=files.config | changes))
    assert error is not None and CONFIG in error.message


RAW_CONFIGS = {
    "empty": b"",
    "null": b"null",
    "deep lists": b'{"r":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "utf-16": json.dumps({"peft_type": "LORA"}).encode("utf-16"),
    "bom": b"\xef\xbb\xbf{}",
    "a key twice": b'{"peft_type": "LORA", "r": 4, "r": 8}',
    "digits": b'{"r": ' + b"9" * 500_000 + b"}",
    "zeros": bytes(1000),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.",
}


@pytest.mark.parametrize("config", RAW_CONFIGS.values(), ids=RAW_CONFIGS)
def test_configs_that_are_no_object(bench: Bench, config: bytes) -> None:
    error = bench.load(str(bench.write(config, bench.files["plain"].weights)))
    assert error is not None and CONFIG in error.message


# ---------------------------------------------------------------------- the weights


def refused(bench: Bench, files: Files) -> MultiloraError:
    error = bench.load_files(files)
    assert error is not None, "it loaded"
    assert SAYS_WHERE.search(error.message), error.message
    return error


@cases(400)
@given(name=adapters, data=st.data())
def test_header_entries_of_any_value(bench: Bench, name: str, data: st.DataObject) -> None:
    files = bench.files[name]
    tensor = data.draw(st.sampled_from(files.names))
    entry = dict(files.header[tensor])
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
    sizes = st.lists(numbers, max_size=9) | values
    entry[field] = data.draw(st.sampled_from(DTYPES) | values if field == "dtype" else sizes)
    entry = entry if data.draw(st.integers(0, 20)) else data.draw(values)
    error = bench.load_files(replace(files, header=files.header | {tensor: entry}))
    assert error is None or SAYS_WHERE.search(error.message)
    if field != "more" and entry != files.header[tensor]:
        assert error is not None
        assert WEIGHTS in error.message


@cases(400)
@given(name=adapters, data=st.data())
def test_tensors_of_any_name(bench: Bench, name: str, data: st.DataObject) -> None:
    """Renamed, so that the old name is missing and the new one left over."""
    files = bench.files[name]
    old = data.draw(st.sampled_from(files.names))
    parts = old.split(".")
    at = data.draw(st.integers(0, len(parts) - 1))
    new = data.draw(texts | texts.map(lambda text: ".".join([*parts[:at], text, *parts[at + 1 :]])))
    header = {new if key == old else key: value for key, value in files.header.items()}
    if new in files.header or new == "__metadata__":
        return
    error = bench.load_files(replace(files, header=header))
    assert error is None or SAYS_WHERE.search(error.message)
    assert error is not None or new.startswith(("model.", "base_model.")) or ".lora_" in new or "layers" in new, new


@cases(300)
@given(name=adapters, data=st.data())
def test_tensors_left_out_or_added(bench: Bench, name: str, data: st.DataObject) -> None:
    files = bench.files[name]
    tensor = data.draw(st.sampled_from(files.names))
    begin, end = files.header[tensor]["data_offsets"]
    if data.draw(st.booleans()):
        header = {k: shift(v, begin, begin - end) for k, v in files.header.items() if k != tensor}
        error = bench.load_files(replace(files, header=header, data=files.data[:begin] + files.data[end:]))
        if ".lora_" in tensor:
            assert error is not None or tensor.endswith("magnitude_vector"), "half of a pair was enough"
        return
    spare = tensor.replace("layers.1", "layers.7") if data.draw(st.booleans()) else f"{tensor}.spare"
    if spare == tensor:
        return
    size = len(files.data)
    added = files.header[tensor] | {"data_offsets": [size, size + end - begin]}
    refused(bench, replace(files, header=files.header | {spare: added}, data=files.data + files.data[begin:end]))


def shift(entry: dict[str, Any], after: int, by: int) -> dict[str, Any]:
    """An entry whose data have moved, if they lay behind `after`."""
    if "data_offsets" not in entry or entry["data_offsets"][0] <= after:
        return entry
    return entry | {"data_offsets": [offset + by for offset in entry["data_offsets"]]}


@cases(400)
@given(name=adapters, data=st.data())
def test_other_shapes_and_dtypes_of_the_same_size(bench: Bench, name: str, data: st.DataObject) -> None:
    """A file that is right in itself, with a tensor that does not fit the model or the config."""
    files = bench.files[name]
    tensor = data.draw(st.sampled_from(files.names))
    entry = files.header[tensor]
    begin, end = entry["data_offsets"]
    dtype, size = data.draw(st.sampled_from([("F32", 4), ("F16", 2), ("BF16", 2)]))
    numel = (end - begin) // size
    divisor = data.draw(st.sampled_from([d for d in range(1, numel + 1) if numel % d == 0]))
    shape = data.draw(
        st.sampled_from([[numel], [divisor, numel // divisor], [1, divisor, numel // divisor], [divisor]])
    )
    header = files.header | {tensor: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}
    error = bench.load_files(replace(files, header=header))
    if [dtype, shape] != [entry["dtype"], entry["shape"]]:
        assert error is not None and SAYS_WHERE.search(error.message)


@cases(300)
@given(name=adapters, at=st.integers(0, 2**32), bits=st.integers(0, 2**32 - 1) | st.just(0x7FC00000))
def test_numbers_of_any_bits(bench: Bench, name: str, at: int, bits: int) -> None:
    files = bench.files[name]
    at = at % (len(files.data) // 4) * 4
    data = files.data[:at] + struct.pack("<I", bits) + files.data[at + 4 :]
    error = bench.load_files(replace(files, data=data))
    finite = bits & 0x7F800000 != 0x7F800000
    assert finite or (error is not None and "finite" in error.message)
    assert error is None or SAYS_WHERE.search(error.message)


@cases(400)
@given(name=adapters, data=st.data())
def test_weights_with_bytes_changed(bench: Bench, name: str, data: st.DataObject) -> None:
    """Cut, lengthened, or some bytes of length or header replaced."""
    weights = bench.files[name].weights
    header = len(weights) - len(bench.files[name].data)
    start = data.draw(st.integers(0, 12) | st.integers(0, header) | st.integers(0, len(weights)))
    kind = data.draw(st.sampled_from(["cut", "replace", "insert", "longer"]))
    some = data.draw(st.binary(min_size=1, max_size=8))
    changed = {
        "cut": weights[:start],
        "replace": weights[:start] + some + weights[start + len(some) :],
        "insert": weights[:start] + some + weights[start:],
        "longer": weights + some,
    }[kind]
    config = json.dumps(bench.files[name].config).encode()
    error = bench.load(str(bench.write(config, changed)))
    assert error is None or SAYS_WHERE.search(error.message)
    if kind != "replace" and len(changed) != len(weights):
        assert error is not None and WEIGHTS in error.message


@cases(200)
@given(
    length=st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2, 2**27, 2**31, 2**63, 2**64 - 1]), rest=st.binary()
)
def test_any_bytes_as_weights(bench: Bench, length: int, rest: bytes) -> None:
    config = json.dumps(bench.files["plain"].config).encode()
    for weights in (rest, length.to_bytes(8, "little") + rest, length.to_bytes(8, "little") + b"{" + rest):
        error = bench.load(str(bench.write(config, weights)))
        assert error is not None and WEIGHTS in error.message


HEADERS: dict[str, Any] = {
    "deeply nested": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a tensor twice": b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": 1}',
    "a petabyte": b'{"a": {"dtype": "F32", "shape": [281474976710656], "data_offsets": [0, 1125899906842624]}}',
    "sizes that overflow": b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
    "a size of 10000 digits": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 4]}}',
    "a thousand dimensions": b'{"a": {"dtype": "F32", "shape": [' + b"1," * 999 + b'1], "data_offsets": [0, 4]}}',
    "no tensors": b"{}",
    "metadata alone": b'{"__metadata__": {"a": [1, {"b": null}]}}',
    "a list": b"[1, 2]",
    "negative": b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers(bench: Bench, header: bytes) -> None:
    config = json.dumps(bench.files["plain"].config).encode()
    error = bench.load(str(bench.write(config, len(header).to_bytes(8, "little") + header + bytes(4))))
    assert error is not None and SAYS_WHERE.search(error.message)


def test_tensors_without_elements(bench: Bench) -> None:
    """Rank 0, and modules of no width: sizes that multiply to nothing."""
    files = bench.files["plain"]
    header: dict[str, Any] = {}
    for name in files.names:
        shape = files.header[name]["shape"]
        empty = [0, shape[1]] if "lora_A" in name else [shape[0], 0]
        header[name] = {"dtype": "F32", "shape": empty, "data_offsets": [0, 0]}
    for r in (0, 1, 4):
        config = files.config | {"r": r, "rank_pattern": {}}
        refused(bench, Files(config, header, b""))


# ---------------------------------------------------------------------- files and paths


def sharded(bench: Bench, index: Any) -> Path:
    folder = bench.folder.with_name("sharded")
    folder.mkdir(exist_ok=True)
    files = bench.files["plain"]
    (folder / CONFIG).write_text(json.dumps(files.config))
    (folder / "part-1.safetensors").write_bytes(files.weights)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@cases(300)
@given(data=st.data())
def test_indexes_of_any_value(bench: Bench, data: st.DataObject) -> None:
    good = dict.fromkeys(bench.files["plain"].names, "part-1.safetensors")
    assert bench.load(str(sharded(bench, {"weight_map": good}))) is None
    outside = st.sampled_from(["../plain/adapter_model.safetensors", f"{bench.good}/{WEIGHTS}", "part-2.safetensors"])
    changes = data.draw(
        st.dictionaries(st.sampled_from(list(good)) | texts, outside | values, min_size=1, max_size=3)
    )
    index = data.draw(st.just({"weight_map": good | changes}) | st.just({"weight_map": changes}) | values)
    error = bench.load(str(sharded(bench, index)))
    assert error is not None and (INDEX in error.message or "named in" in error.message), (index, error)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": fifo,
    "a directory": Path.mkdir,
    "a socket": unix_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "missing": lambda path: None,
    "empty": Path.touch,
    "a hole of a terabyte": terabyte,
}


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_no_files(bench: Bench, file: str, kind: str, tmp_path: Path) -> None:
    files = bench.files["plain"]
    (tmp_path / CONFIG).write_text(json.dumps(files.config))
    (tmp_path / WEIGHTS).write_bytes(files.weights)
    (tmp_path / file).unlink()
    KINDS[kind](tmp_path / file)
    error = bench.load(str(tmp_path))
    assert error is not None and (file in error.message or kind == "a hole of a terabyte")


def test_a_rank_that_no_memory_could_hold(bench: Bench) -> None:
    """Right in itself, in a file with holes: only its size speaks against it."""
    rank = 1 << 30
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    size = rank * 16 * 4
    header = {
        f"{name}A.weight": {"dtype": "F32", "shape": [rank, 16], "data_offsets": [0, size]},
        f"{name}B.weight": {"dtype": "F32", "shape": [16, rank], "data_offsets": [size, 2 * size]},
    }
    config = bench.files["plain"].config | {"r": rank, "rank_pattern": {}}
    folder = bench.write(json.dumps(config).encode(), Files(config, header, b"").weights)
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + 2 * size)
    error = bench.load(str(folder))
    assert error is not None and "bytes, over" in error.message


def test_links_to_good_files_are_fine(bench: Bench, tmp_path: Path) -> None:
    for file in (CONFIG, WEIGHTS):
        (tmp_path / file).symlink_to(Path(bench.good) / file)
    assert bench.load(str(tmp_path)) is None


@cases(300)
@given(path=texts | st.text(alphabet="./~\0ab@:", max_size=8) | texts.map(lambda text: f"/{text}"))
def test_paths_of_any_text(bench: Bench, path: str) -> None:
    assert bench.load(path) is not None


@cases(300)
@given(name=texts)
def test_names_of_any_text(bench: Bench, name: str) -> None:
    error = bench.load(bench.good, name)
    assert error is None or "name" in error.message
