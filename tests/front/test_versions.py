"""The label of what a request runs on: which version's it is, and that it stays."""

import pytest

from multilora.engine.messages import AdapterInfo
from multilora.errors import BadRequest
from multilora.front.adapter_spec import BASE, AdapterSpec
from multilora.front.registry import AdapterRegistry
from multilora.front.versions import VersionHistory, VersionLabel, VersionSpan


@pytest.fixture
def registry() -> AdapterRegistry:
    return AdapterRegistry("base", enabled=True)


def load(registry: AdapterRegistry, name: str, *, replace: bool = False, weight_version: str | None = None) -> int:
    version = registry.begin_load(name, "/p", replace=replace, weight_version=weight_version)
    info = AdapterInfo(version=version, path="p", rank=8, target_modules=["q_proj"], nbytes=1, pages=1)
    registry.commit_load(version, info)
    return version


def only(name: str) -> AdapterSpec:
    return ((name, 1.0),)


def test_a_request_keeps_the_label_that_it_began_with(registry: AdapterRegistry) -> None:
    assert registry.acquire(BASE).label == VersionLabel("default", None)
    first = load(registry, "a", weight_version="step 1")
    running = registry.acquire(only("a"))
    assert running.label == VersionLabel("step 1", first)
    second = load(registry, "a", replace=True)
    assert registry.acquire(only("a")).label == VersionLabel("default", second)
    unnamed = registry.acquire(only("a"))
    registry.label_weights("server 2")
    assert registry.acquire(only("a")).label == VersionLabel("server 2", second)
    assert registry.acquire(BASE).label == VersionLabel("server 2", None)
    assert (running.label, unnamed.label) == (VersionLabel("step 1", first), VersionLabel("default", second))


def test_the_label_of_several_adapters_is_the_newest_ones(registry: AdapterRegistry) -> None:
    load(registry, "a", weight_version="a1")
    b = load(registry, "b", weight_version="b1")
    assert registry.acquire((("a", 0.5), ("b", 0.5))).label == VersionLabel("b1", b)
    registry.compose("mix", (("a", 0.5), ("b", 0.5)), weight_version="mixed")
    mix = registry.acquire(only("mix")).label
    assert mix.weight_version == "mixed" and (mix.lora_version or 0) > b
    a = load(registry, "a", replace=True, weight_version="a2")
    assert registry.acquire(only("mix")).label == VersionLabel("a2", a)


def test_an_answers_spans() -> None:
    old, middle, new = (VersionLabel(str(i), i) for i in range(3))
    history = VersionHistory(old)
    assert history.spans(0) == [VersionSpan(0, 0, old)]
    history.switch(4, middle)
    assert history.spans(4) == [VersionSpan(0, 4, old)], "the switch is to come"
    assert history.spans(6) == [VersionSpan(0, 4, old), VersionSpan(4, 6, middle)]
    history.switch(4, new)
    assert history.spans(6) == [VersionSpan(0, 4, old), VersionSpan(4, 6, new)], "no token is the middle one's"
    assert [history.last(end) for end in (0, 4, 5)] == [old, old, new]
    before = VersionHistory(old)
    before.switch(0, new)
    assert before.spans(2) == [VersionSpan(0, 2, new)]


def test_a_request_that_goes_on_with_another_version_holds_that(registry: AdapterRegistry) -> None:
    old, other = load(registry, "a", weight_version="a1"), load(registry, "b")
    registry.compose("mix", (("a", 0.5), ("b", 2.0)))
    held = registry.acquire(only("mix"))
    new = load(registry, "a", replace=True, weight_version="a2")
    idle: list[int] = []
    registry.when_idle(old, lambda: idle.append(old))
    assert idle == []
    held = registry.switch(held, old, new)
    assert idle == [old]
    assert held.composition == ((new, 0.5), (other, 2.0))
    assert held.label == VersionLabel("a2", new)
    assert [registry.num_requests(version) for version in (new, other)] == [1, 1]
    registry.release(held)
    assert [ref.num_requests for ref in registry.refs()] == [0, 0, 0]


@pytest.mark.parametrize("label", ["", "x" * 257])
def test_labels_have_a_bounded_length(registry: AdapterRegistry, label: str) -> None:
    with pytest.raises(BadRequest, match="weight_version: has 1 to 256 characters"):
        registry.begin_load("a", "/p", weight_version=label)
    with pytest.raises(BadRequest, match="new_version: has 1 to 256 characters"):
        registry.label_weights(label)
    assert (registry.weight_version, registry.loaded()) == ("default", {})
    load(registry, "a", weight_version="x" * 256)
