import random

import pytest

from multilora.engine.messages import AdapterInfo
from multilora.errors import (
    AdapterAlreadyLoaded,
    AdapterError,
    AdapterNotLoaded,
    AdapterUnloading,
    BadRequest,
    LoraNotEnabled,
    MultiloraError,
    UnknownAdapter,
    UnknownModel,
)
from multilora.text.registry import AdapterRegistry


@pytest.fixture
def registry() -> AdapterRegistry:
    return AdapterRegistry("base", enabled=True)


def info(version: int) -> AdapterInfo:
    return AdapterInfo(version=version, path="p", rank=8, target_modules=["q_proj"], nbytes=1, pages=1)


def load(registry: AdapterRegistry, name: str, path: str = "/p", **options) -> int:
    version = registry.begin_load(name, path, **options)
    registry.commit_load(version, info(version))
    return version


def test_a_loaded_adapter_is_listed_and_served(registry):
    a, b = load(registry, "a", "/pa"), load(registry, "b", "/pb", pinned=True)
    assert a != b
    assert list(registry.loaded().items()) == [("a", "/pa"), ("b", "/pb")]
    assert [(e.name, e.pinned, e.info.version) for e in registry.entries()] == [("a", False, a), ("b", True, b)]
    assert registry.acquire("a") == a
    assert registry.name_of(a) == "a"
    assert registry.name_of(None) is None


def test_base_needs_no_adapter(registry):
    assert registry.acquire(None) is None
    registry.release(None)
    off = AdapterRegistry("base", enabled=False)
    assert off.acquire(None) is None
    assert off.resolve_model("base", None) is None


def test_never_loaded(registry):
    with pytest.raises(UnknownAdapter, match=r"'a' has never been loaded, or was unloaded"):
        registry.acquire("a")
    version = registry.begin_load("a", "/p")
    with pytest.raises(UnknownAdapter):
        registry.acquire("a")
    registry.fail_load(version)
    with pytest.raises(UnknownAdapter):
        registry.acquire("a")
    assert registry.loaded() == {}
    assert registry.name_of(version) is None
    assert load(registry, "a") > version


def test_lora_off():
    off = AdapterRegistry("base", enabled=False)
    for call in (
        lambda: off.acquire("a"),
        lambda: off.begin_load("a", "/p"),
        lambda: off.resolve_model("base:a", None),
        lambda: off.resolve_model("base", "a"),
    ):
        with pytest.raises(LoraNotEnabled, match="LoRA is not enabled"):
            call()
    with pytest.raises(UnknownModel):
        off.resolve_model("a", None)


@pytest.mark.parametrize(
    ("name", "path"),
    [("", "/p"), ("x" * 257, "/p"), ("a:b", "/p"), ("a/b", "/p"), ("base", "/p"), ("a:b", "a:b"), ("base", "base")],
)
def test_bad_names(registry, name, path):
    with pytest.raises(BadRequest) as e:
        registry.begin_load(name, path)
    assert e.value.param == "lora_name"


@pytest.mark.parametrize("name", ["x" * 256, "a b", "Ä", "a=b", "a.b-c_d"])
def test_good_names(registry, name):
    registry.check_name(name, "/p")


def test_a_bare_path_may_be_a_name(registry):
    version = load(registry, "org/adapter", "org/adapter")
    assert registry.acquire("org/adapter") == version
    assert registry.resolve_model("org/adapter", None) == "org/adapter"
    assert registry.resolve_model("base:org/adapter", None) == "org/adapter"


def test_load_twice(registry):
    first = registry.begin_load("a", "/p")
    for replace in (False, True):
        with pytest.raises(AdapterAlreadyLoaded, match="already loaded"):
            registry.begin_load("a", "/q", replace=replace)
    registry.commit_load(first, info(first))
    with pytest.raises(AdapterAlreadyLoaded, match="already loaded"):
        registry.begin_load("a", "/q")
    assert registry.loaded() == {"a": "/p"}


def test_unload(registry):
    version = load(registry, "a")
    assert registry.acquire("a") == version
    assert registry.begin_unload("a") == version
    assert registry.loaded() == {}
    with pytest.raises(AdapterUnloading, match="being unloaded"):
        registry.acquire("a")
    with pytest.raises(AdapterUnloading, match="being unloaded"):
        registry.begin_load("a", "/p", replace=True)
    with pytest.raises(AdapterUnloading):
        registry.begin_unload("a")
    idle = []
    registry.when_idle(version, lambda: idle.append(version))
    assert idle == []
    registry.release(version)
    assert idle == [version]
    registry.finish_unload(version)
    with pytest.raises(UnknownAdapter, match="or was unloaded"):
        registry.acquire("a")
    with pytest.raises(AdapterNotLoaded, match="does not exist"):
        registry.begin_unload("a")
    again = load(registry, "a", "/q")
    assert again > version
    assert registry.acquire("a") == again


def test_unload_while_loading(registry):
    version = registry.begin_load("a", "/p")
    with pytest.raises(AdapterNotLoaded, match="does not exist"):
        registry.begin_unload("a")
    registry.commit_load(version, info(version))
    registry.begin_load("a", "/q", replace=True)
    with pytest.raises(AdapterError, match="being replaced"):
        registry.begin_unload("a")


def test_replace_in_place(registry):
    old = load(registry, "a", "/p")
    load(registry, "b")
    running = registry.acquire("a")
    new = registry.begin_load("a", "/q", replace=True)
    assert registry.acquire("a") == old
    assert registry.commit_load(new, info(new)) == old
    assert registry.acquire("a") == new
    assert list(registry.loaded().items()) == [("a", "/q"), ("b", "/p")]
    assert registry.active(old) == 2
    assert registry.name_of(old) == "a"
    idle = []
    registry.when_idle(old, lambda: idle.append("old"))
    registry.release(running)
    registry.release(old)
    assert idle == ["old"]
    registry.finish_unload(old)
    assert registry.acquire("a") == new


def test_a_failed_replacement_leaves_the_old_one(registry):
    old = load(registry, "a", "/p")
    registry.fail_load(registry.begin_load("a", "/q", replace=True))
    assert registry.loaded() == {"a": "/p"}
    assert registry.acquire("a") == old


def test_first_load_with_replace(registry):
    version = registry.begin_load("a", "/p", replace=True)
    assert registry.commit_load(version, info(version)) is None


def test_idle_at_once_and_only_once(registry):
    version = load(registry, "a")
    calls = []
    registry.when_idle(version, lambda: calls.append(1))
    assert calls == [1]
    registry.acquire("a")
    registry.when_idle(version, lambda: calls.append(2))
    for _ in range(2):
        registry.release(version)
        registry.acquire("a")
    assert calls == [1, 2]


def test_our_own_mistakes_are_assertions(registry):
    version = load(registry, "a")
    with pytest.raises(AssertionError):
        registry.release(version)
    with pytest.raises(AssertionError):
        registry.finish_unload(version)
    with pytest.raises(AssertionError):
        registry.commit_load(version, info(version))


def test_too_many_adapters_in_one_request():
    registry = AdapterRegistry("base", enabled=True, max_loaded=2)
    registry.check_request(["a", "b", None, "a"])
    with pytest.raises(BadRequest, match="3 adapters"):
        registry.check_request(["a", "b", "c"])


@pytest.mark.parametrize(
    ("model", "lora_path", "adapter"),
    [
        ("base", None, None),
        ("base:", None, None),
        ("base:a", None, "a"),
        ("a", None, "a"),
        ("base", "a", "a"),
        ("base:", "a", "a"),
        ("base:a", "a", "a"),
        ("a", "a", "a"),
    ],
)
def test_resolve_model(registry, model, lora_path, adapter):
    load(registry, "a")
    assert registry.resolve_model(model, lora_path) == adapter


@pytest.mark.parametrize(
    ("model", "lora_path", "error", "param"),
    [
        ("nope", None, UnknownModel, "model"),
        ("", None, UnknownModel, "model"),
        ("other:a", None, UnknownModel, "model"),
        (":a", None, UnknownModel, "model"),
        ("a:b", None, UnknownModel, "model"),
        ("base:nope", None, UnknownAdapter, "model"),
        ("base:a:b", None, UnknownAdapter, "model"),
        ("base", "nope", UnknownAdapter, "lora_path"),
        ("base", "", UnknownAdapter, "lora_path"),
        ("a", "b", BadRequest, "lora_path"),
        ("base:a", "b", BadRequest, "lora_path"),
        ("nope", "a", UnknownModel, "model"),
    ],
)
def test_resolve_model_refuses(registry, model, lora_path, error, param):
    load(registry, "a")
    load(registry, "b")
    with pytest.raises(error) as e:
        registry.resolve_model(model, lora_path)
    assert type(e.value) is error
    assert e.value.param == param


def test_an_adapter_being_unloaded_is_not_unknown(registry):
    load(registry, "a")
    registry.begin_unload("a")
    assert registry.resolve_model("a", None) == "a"
    with pytest.raises(AdapterUnloading):
        registry.acquire("a")


def test_random_operations():
    """Thousands of operations on few names: versions are never reused, counts agree with a naive model."""
    rng = random.Random(7)
    registry = AdapterRegistry("base", enabled=True)
    seen: set[int] = set()
    loading: list[int] = []
    held: list[int] = []
    waiting: set[int] = set()  # begun to unload or replaced, not finished

    def retire(version: int) -> None:
        waiting.add(version)
        registry.when_idle(version, lambda: (registry.finish_unload(version), waiting.remove(version)))

    for _ in range(5000):
        name = rng.choice("abcd")
        try:
            match rng.randrange(7):
                case 0:
                    version = registry.begin_load(name, "/p", replace=rng.random() < 0.5)
                    assert version not in seen
                    seen.add(version)
                    loading.append(version)
                case 1 if loading:
                    version = loading.pop(rng.randrange(len(loading)))
                    replaced = registry.commit_load(version, info(version))
                    if replaced is not None:
                        retire(replaced)
                case 2 if loading:
                    registry.fail_load(loading.pop(rng.randrange(len(loading))))
                case 3:
                    retire(registry.begin_unload(name))
                case 4 | 5:
                    held.append(registry.acquire(name))
                case 6 if held:
                    registry.release(held.pop(rng.randrange(len(held))))
        except MultiloraError:
            pass
        for version in set(held):
            assert registry.active(version) == held.count(version)
        assert waiting <= set(held)
        assert all(e.version not in waiting for e in registry.entries())
    assert len(seen) > 300
