"""Names, versions, states and counts of requests. Covers `adapter_ref.py`, `adapter_names.py` too."""

import random
from collections import Counter

import msgspec
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
from multilora.front.adapter_ref import Held
from multilora.front.adapter_spec import BASE, AdapterSpec
from multilora.front.registry import AdapterRegistry
from multilora.params import Composition


@pytest.fixture
def registry() -> AdapterRegistry:
    return AdapterRegistry("base", enabled=True)


def info(version: int) -> AdapterInfo:
    return AdapterInfo(version=version, path="p", rank=8, target_modules=["q_proj"], nbytes=1, pages=1)


def load(registry: AdapterRegistry, name: str, path: str = "/p", **options) -> int:
    version = registry.begin_load(name, path, **options)
    registry.commit_load(version, info(version))
    return version


def only(name: str | None) -> AdapterSpec:
    return BASE if name is None else ((name, 1.0),)


def plainly(version: int) -> Composition:
    return ((version, 1.0),)


def test_a_loaded_adapter_is_listed_and_served(registry):
    a, b = load(registry, "a", "/pa"), load(registry, "b", "/pb", pinned=True)
    assert a != b
    assert list(registry.loaded().items()) == [("a", "/pa"), ("b", "/pb")]
    assert [(e.name, e.pinned, e.info.version) for e in registry.refs()] == [("a", False, a), ("b", True, b)]
    assert registry.acquire(only("a")).composition == plainly(a)
    assert registry.name_of(a) == "a"
    assert registry.name_of(None) is None


def test_base_needs_no_adapter(registry):
    held = registry.acquire(BASE)
    assert held == Held()
    registry.release(held)
    off = AdapterRegistry("base", enabled=False)
    assert off.acquire(BASE) == Held()
    assert off.resolve_model("base") == BASE


def test_never_loaded(registry):
    with pytest.raises(UnknownAdapter, match=r"'a' has never been loaded, or was unloaded"):
        registry.acquire(only("a"))
    version = registry.begin_load("a", "/p")
    with pytest.raises(UnknownAdapter):
        registry.acquire(only("a"))
    registry.fail_load(version)
    with pytest.raises(UnknownAdapter):
        registry.acquire(only("a"))
    assert registry.loaded() == {}
    assert registry.name_of(version) is None
    assert load(registry, "a") > version


def test_lora_off():
    off = AdapterRegistry("base", enabled=False)
    for call in (
        lambda: off.acquire(only("a")),
        lambda: off.begin_load("a", "/p"),
        lambda: off.resolve_model("base:a"),
        lambda: off.resolve_model("base", only("a")),
    ):
        with pytest.raises(LoraNotEnabled, match="LoRA is not enabled"):
            call()
    with pytest.raises(UnknownModel):
        off.resolve_model("a", None)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("", "/p"),
        ("x" * 257, "/p"),
        ("a:b", "/p"),
        ("default", "/p"),
        ("base", "/p"),
        ("a:b", "a:b"),
        ("base", "base"),
    ],
)
def test_bad_names(registry, name, path):
    with pytest.raises(BadRequest) as e:
        registry.begin_load(name, path)
    assert e.value.param == "lora_name"


@pytest.mark.parametrize("name", ["x" * 256, "a b", "Ä", "a=b", "a.b-c_d", "org/adapter", "../x"])
def test_good_names(registry, name):
    registry.check_name(name)


def test_a_bare_path_may_be_a_name(registry):
    version = load(registry, "org/adapter", "org/adapter")
    assert registry.acquire(only("org/adapter")).composition == plainly(version)
    assert registry.resolve_model("org/adapter") == only("org/adapter")
    assert registry.resolve_model("base:org/adapter") == only("org/adapter")


def test_load_twice(registry):
    first = registry.begin_load("a", "/p")
    with pytest.raises(AdapterAlreadyLoaded, match="already loaded"):
        registry.begin_load("a", "/q")
    registry.commit_load(first, info(first))
    with pytest.raises(AdapterAlreadyLoaded, match="already loaded"):
        registry.begin_load("a", "/q")
    assert registry.loaded() == {"a": "/p"}


@pytest.mark.parametrize("later_first", [False, True])
def test_of_two_replacements_the_later_one_stays(registry, later_first):
    current = load(registry, "a", "/old")
    earlier = registry.begin_load("a", "/earlier", replace=True)
    later = registry.begin_load("a", "/later", replace=True)
    with pytest.raises(AdapterAlreadyLoaded):
        registry.begin_load("a", "/strict")
    order = (later, earlier) if later_first else (earlier, later)
    replaced = [registry.commit_load(order[0], info(order[0]))]
    with pytest.raises(AdapterError, match="being replaced"):
        registry.begin_unload("a")
    replaced.append(registry.commit_load(order[1], info(order[1])))
    assert replaced == [current, earlier]
    assert registry.loaded() == {"a": "/later"}
    assert registry.acquire(only("a")).composition == plainly(later)
    for version in replaced:
        registry.finish_unload(version)
    assert registry.begin_unload("a") == later


def test_of_two_replacements_the_later_one_fails(registry):
    current = load(registry, "a", "/old")
    earlier = registry.begin_load("a", "/earlier", replace=True)
    registry.fail_load(registry.begin_load("a", "/later", replace=True))
    assert registry.commit_load(earlier, info(earlier)) == current
    assert registry.loaded() == {"a": "/earlier"}


def test_unload(registry):
    version = load(registry, "a")
    held = registry.acquire(only("a"))
    assert held.composition == plainly(version)
    assert registry.begin_unload("a") == version
    assert registry.loaded() == {}
    with pytest.raises(AdapterUnloading, match="being unloaded"):
        registry.acquire(only("a"))
    with pytest.raises(AdapterUnloading, match="being unloaded"):
        registry.begin_load("a", "/p", replace=True)
    with pytest.raises(AdapterUnloading):
        registry.begin_unload("a")
    idle = []
    registry.when_idle(version, lambda: idle.append(version))
    assert idle == []
    registry.release(held)
    assert idle == [version]
    registry.finish_unload(version)
    with pytest.raises(UnknownAdapter, match="or was unloaded"):
        registry.acquire(only("a"))
    with pytest.raises(AdapterNotLoaded, match="does not exist"):
        registry.begin_unload("a")
    again = load(registry, "a", "/q")
    assert again > version
    assert registry.acquire(only("a")).composition == plainly(again)


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
    running = registry.acquire(only("a"))
    new = registry.begin_load("a", "/q", replace=True)
    second = registry.acquire(only("a"))
    assert second.composition == plainly(old)
    assert registry.commit_load(new, info(new)) == old
    assert registry.acquire(only("a")).composition == plainly(new)
    assert list(registry.loaded().items()) == [("a", "/q"), ("b", "/p")]
    assert registry.num_requests(old) == 2
    assert registry.name_of(old) == "a"
    idle = []
    registry.when_idle(old, lambda: idle.append("old"))
    registry.release(running)
    registry.release(second)
    assert idle == ["old"]
    registry.finish_unload(old)
    assert registry.acquire(only("a")).composition == plainly(new)


def test_a_failed_replacement_leaves_the_old_one(registry):
    old = load(registry, "a", "/p")
    registry.fail_load(registry.begin_load("a", "/q", replace=True))
    assert registry.loaded() == {"a": "/p"}
    assert registry.acquire(only("a")).composition == plainly(old)


def test_first_load_with_replace(registry):
    version = registry.begin_load("a", "/p", replace=True)
    assert registry.commit_load(version, info(version)) is None


def test_idle_at_once_and_only_once(registry):
    version = load(registry, "a")
    calls = []
    registry.when_idle(version, lambda: calls.append(1))
    assert calls == [1]
    held = registry.acquire(only("a"))
    registry.when_idle(version, lambda: calls.append(2))
    for _ in range(2):
        registry.release(held)
        held = registry.acquire(only("a"))
    assert calls == [1, 2]


def test_our_own_mistakes_are_assertions(registry):
    version = load(registry, "a")
    held = registry.acquire(only("a"))
    registry.release(held)
    with pytest.raises(AssertionError):
        registry.release(held)
    with pytest.raises(AssertionError):
        registry.finish_unload(version)
    with pytest.raises(AssertionError):
        registry.commit_load(version, info(version))


def test_too_many_adapters_in_one_request():
    registry = AdapterRegistry("base", enabled=True, max_loaded=2)
    registry.check_request([only("a"), only("b"), BASE, only("a")])
    with pytest.raises(BadRequest, match="3 adapters"):
        registry.check_request([only("a"), (("b", 0.5), ("c", 2.0))])


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
    assert registry.resolve_model(model, only(lora_path)) == only(adapter)


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
        registry.resolve_model(model, only(lora_path))
    assert type(e.value) is error
    assert e.value.param == param


def test_an_adapter_being_unloaded_is_not_unknown(registry):
    load(registry, "a")
    registry.begin_unload("a")
    assert registry.resolve_model("a") == only("a")
    with pytest.raises(AdapterUnloading):
        registry.acquire(only("a"))


def some_choice(rng: random.Random, name: str) -> AdapterSpec:
    if rng.random() < 0.6:
        return only(name)
    return tuple((part, rng.choice([0.0, 0.5, 1.0])) for part in rng.sample("abcd", k=rng.randrange(1, 4)))


def test_random_operations():
    """Thousands of operations on few names: versions are never reused, counts agree with a naive model."""
    rng = random.Random(7)
    registry = AdapterRegistry("base", enabled=True)
    seen: set[int] = set()
    loading: list[int] = []
    held: list[Held] = []
    waiting: set[int] = set()  # begun to unload or replaced, not finished

    def retire(version: int) -> None:
        waiting.add(version)
        registry.when_idle(version, lambda: (registry.finish_unload(version), waiting.remove(version)))

    for _ in range(5000):
        name = rng.choice("abcd")
        try:
            match rng.randrange(9):
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
                    held.append(registry.acquire(some_choice(rng, name)))
                case 6 if held:
                    registry.release(held.pop(rng.randrange(len(held))))
                case 7:
                    replaced = registry.compose(name, some_choice(rng, "a"), replace=rng.random() < 0.5)
                    seen.add(next(e.version for e in registry.refs() if e.name == name))
                    if replaced is not None:
                        retire(replaced)
        except MultiloraError:
            pass
        users = Counter(ref.version for h in held for ref in h.refs)
        for version, count in users.items():
            assert registry.num_requests(version) == count
        assert waiting <= set(users)
        for h in held:  # whatever happened since, the engine may be asked for all of it
            assert {version for version, _ in h.composition} <= set(users)
            assert not any(registry.is_composition(version) for version, _ in h.composition)
        assert all(e.version not in waiting for e in registry.refs())
    assert len(seen) > 300


def awkward(version: int) -> AdapterInfo:
    return msgspec.structs.replace(info(version), not_composable_reason="it uses DoRA")


def test_a_composition_of_one_request(registry):
    a, b = load(registry, "a"), load(registry, "b")
    held = registry.acquire((("b", 0.3), ("a", -2.0)))
    assert held.composition == ((b, 0.3), (a, -2.0))
    assert registry.num_requests(a) == registry.num_requests(b) == 1
    registry.release(held)
    assert registry.num_requests(a) == registry.num_requests(b) == 0
    assert registry.acquire((("a", 1.0), ("b", 0.0))).composition == plainly(a)  # 0: not there
    assert registry.acquire((("a", 0.0), ("b", 0.0))).composition == ()
    with pytest.raises(UnknownAdapter, match="'c' has never"):
        registry.acquire((("a", 0.5), ("c", 0.0)))
    registry.begin_unload("b")
    with pytest.raises(AdapterUnloading):
        registry.acquire((("a", 0.5), ("b", 0.5)))


def test_what_is_not_of_low_rank_alone_cannot_be_composed(registry):
    load(registry, "a")
    version = registry.begin_load("d", "/p")
    registry.commit_load(version, awkward(version))
    assert registry.acquire(only("d")).composition == plainly(version)
    for spec in [(("a", 1.0), ("d", 1.0)), (("d", 0.5),), (("d", 0.0),)]:
        with pytest.raises(BadRequest, match=r"'d' cannot be composed: it uses DoRA") as e:
            registry.acquire(spec)
        assert e.value.param == "lora_path"
    with pytest.raises(BadRequest, match="cannot be composed"):
        registry.compose("mix", (("a", 1.0), ("d", 1.0)))


def test_a_named_composition(registry):
    a, b = load(registry, "a", "/a"), load(registry, "b", "/b")
    parts = (("a", 0.75), ("b", 1.0))
    assert registry.compose("mix", parts) is None
    assert registry.loaded() == {"a": "/a", "b": "/b", "mix": "0.75 * a + b"}
    assert registry.resolve_model("base:mix") == registry.resolve_model("mix") == only("mix")
    held = registry.acquire(only("mix"))
    assert held.composition == ((a, 0.75), (b, 1.0))
    for name in ("a", "b"):
        with pytest.raises(AdapterError, match="part of composition 'mix': unload that first"):
            registry.begin_unload(name)
    mix = registry.begin_unload("mix")
    assert registry.is_composition(mix)
    assert not registry.is_composition(a)
    assert registry.num_requests(mix) == registry.num_requests(a) == 1, "it waits, and so would its parts"
