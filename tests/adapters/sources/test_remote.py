"""Adapters from buckets and web servers: what is fetched, what is kept, what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from multilora.adapters.sources.files import MAX_CONFIG_BYTES
from multilora.adapters.sources.remote import RemoteSource, is_remote_url
from multilora.errors import AdapterError, AdapterInvalid, AdapterNotFound

URL = "s3://bucket/adapters/one"
FILES = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": b"weights"}


class Bucket(MemoryFileSystem):
    """A store of its own for each test. `opened`: what was downloaded; `changes`: what happens at the n-th open;
    `silent`: it tells nothing about a file but its size."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.store = {}
        self.pseudo_dirs = [""]
        self.opened = []
        self.changes = {}
        self.silent = False

    def info(self, path, **options):
        found = super().info(path, **options)
        return {"size": found["size"]} if self.silent else found

    def put_all(self, files, base="/bucket/adapters/one"):
        for name, data in files.items():
            self.pipe_file(f"{base}/{name}", data)

    def open(self, path, mode="rb", **options):
        if mode == "rb":
            self.opened.append(path.rsplit("/", 1)[-1])
            if change := self.changes.pop(len(self.opened), None):
                change()
        return super().open(path, mode, **options)


@pytest.fixture
def bucket():
    found = Bucket()
    found.put_all(FILES)
    return found


@pytest.fixture
def source(bucket, tmp_path):
    return RemoteSource(tmp_path / "cache", ["tokenizer.json"], lambda url: (bucket, "/" + url.partition("://")[2]))


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_are_fetched_once(bucket, source):
    folder = source.fetch(URL)
    assert read(folder) == FILES
    assert source.fetch(URL) == source.fetch(URL + "/") == folder
    assert sorted(bucket.opened) == sorted(FILES)


def test_files_that_nobody_asked_for_stay_where_they_are(bucket, source):
    bucket.put_all({"optimizer.pt": b"x", "README.md": b"x", "tokenizer.json": b"{}"})
    assert read(source.fetch(URL)) == FILES | {"tokenizer.json": b"{}"}


def test_a_new_state_is_a_new_folder_and_the_old_one_stays(bucket, source):
    old = source.fetch(URL)
    bucket.put_all({"adapter_model.safetensors": b"others!"})
    new = source.fetch(URL)
    assert new != old
    assert read(old) == FILES
    assert read(new)["adapter_model.safetensors"] == b"others!"


def test_a_server_that_tells_nothing_about_its_files_is_never_taken_from_the_cache(bucket, source):
    bucket.silent = True
    first = source.fetch(URL)
    assert source.fetch(URL) != first
    assert read(first) == FILES


def sharded(names):
    index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}}
    return {"adapter_config.json": b"{}", "adapter_model.safetensors.index.json": json.dumps(index).encode()}


def test_sharded_weights(tmp_path, bucket, source):
    del bucket.store["/bucket/adapters/one/adapter_model.safetensors"]
    files = sharded(["a.safetensors", "b.safetensors", "a.safetensors"])
    files |= {"a.safetensors": b"a", "b.safetensors": b"b"}
    bucket.put_all(files)
    first = source.fetch(URL)
    assert read(first) == files
    bucket.put_all({"b.safetensors": b"c"})  # with the same index
    assert read(source.fetch(URL))["b.safetensors"] == b"c"


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/a.safetensors", "x/a.safetensors", "a.bin", ".a.safetensors", 7]
)
def test_an_index_that_names_files_elsewhere_is_refused(bucket, source, name):
    del bucket.store["/bucket/adapters/one/adapter_model.safetensors"]
    bucket.put_all(sharded([name]))
    with pytest.raises(AdapterInvalid, match="weight_map"):
        source.fetch(URL)


def test_a_missing_shard(bucket, source):
    del bucket.store["/bucket/adapters/one/adapter_model.safetensors"]
    bucket.put_all(sharded(["a.safetensors"]))
    with pytest.raises(AdapterNotFound, match=r"no a\.safetensors"):
        source.fetch(URL)


@pytest.mark.parametrize("missing", FILES)
def test_what_is_no_adapter_is_not_found(bucket, source, missing, tmp_path):
    del bucket.store[f"/bucket/adapters/one/{missing}"]
    with pytest.raises(AdapterNotFound, match=f"no {missing}"):
        source.fetch(URL)
    assert not (tmp_path / "cache").exists()


def test_a_change_in_the_middle_is_an_error_and_leaves_nothing(bucket, source, tmp_path):
    bucket.changes[2] = lambda: bucket.put_all({"adapter_config.json": b"{}"})
    with pytest.raises(AdapterError, match="changed while"):
        source.fetch(URL)
    assert list((tmp_path / "cache").iterdir()) == []
    assert read(source.fetch(URL))["adapter_config.json"] == b"{}"


def test_sizes_are_bounded(bucket, tmp_path):
    small = RemoteSource(tmp_path, (), lambda url: (bucket, "/bucket/adapters/one"), max_bytes=len(b"weights"))
    with pytest.raises(AdapterInvalid, match="more than"):
        small.fetch(URL)
    bucket.put_all({"adapter_config.json": b" " * (MAX_CONFIG_BYTES + 1)})
    with pytest.raises(AdapterInvalid, match=f"adapter_config.json.*more than {MAX_CONFIG_BYTES} bytes"):
        RemoteSource(tmp_path, (), lambda url: (bucket, "/bucket/adapters/one")).fetch(URL)
    assert list(tmp_path.iterdir()) == []


def test_two_at_a_time_agree(bucket, source, tmp_path):
    """The other thread's folder appears while this one downloads."""
    found = []
    bucket.changes[1] = lambda: found.append(source.fetch(URL))
    assert [source.fetch(URL)] == found
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FileNotFoundError("x"), AdapterNotFound, "not found"),
        (PermissionError("x"), AdapterError, "access denied"),
        (ImportError("x"), AdapterError, "needs the packages fsspec and s3fs"),
        (RuntimeError("boom"), AdapterError, "download failed: RuntimeError"),
    ],
)
def test_errors_below_become_ours(tmp_path, error, kind, text):
    def fail(url):
        raise error

    with pytest.raises(kind, match=text) as caught:
        RemoteSource(tmp_path, (), fail).fetch(URL)
    assert isinstance(caught.value, AdapterError)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc",
        "memory://x/y",
        "zip://a.zip::s3://bucket/x",
        "s3://bucket/../x",
        "s3://bucket",
        "s3:///x",
        "http://host/a?b=c",
        "http://host/a#b",
        "simplecache::s3://bucket/x",
        "S3://bucket/x",
        "s3://bucket/a b",
        "bucket/x",
    ],
)
def test_other_urls_are_refused_before_anything_is_opened(tmp_path, url):
    assert not is_remote_url(url)
    with pytest.raises(AdapterInvalid, match="URL is expected"):
        RemoteSource(tmp_path, (), lambda url: pytest.fail("opened")).fetch(url)


def test_fsspec_itself_or_what_it_lacks(tmp_path):
    """aiohttp may be installed here or not; nobody answers at that port."""
    wanted = "download failed" if importlib.util.find_spec("aiohttp") else "needs the packages fsspec and aiohttp"
    with pytest.raises(AdapterError, match=wanted):
        RemoteSource(tmp_path).fetch("http://127.0.0.1:9/x")


def test_the_cache_is_the_user_s(monkeypatch, tmp_path, bucket):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = RemoteSource(None, (), lambda url: (bucket, "/bucket/adapters/one")).fetch(URL)
    assert folder.parent == tmp_path / "multilora" / "adapters"
