"""The transition table, and that docs/memory.md draws it."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from multilora.adapters.host.mapping import HostEntry
from multilora.adapters.lifecycle.version import PLACES, TRANSITIONS, AdapterVersion, DeviceEntry, State
from multilora.lora.panels import AdapterShape, PanelLayout

LAYOUT = PanelLayout(1, AdapterShape(()), (), (), (), 8)


def adapter_in(state: State) -> AdapterVersion:
    adapter = AdapterVersion(1, "/1", False, state=state, layout=LAYOUT)
    settle(adapter, state)
    return adapter


def settle(adapter: AdapterVersion, state: State) -> None:
    """Put its bytes where they belong in a state."""
    on_host, on_device = PLACES.get(state, ({False}, {False}))
    adapter.host = HostEntry(LAYOUT, torch.zeros(1, 8, dtype=torch.uint8)) if True in on_host else None
    adapter.device = DeviceEntry(0, [0], 1, 1, 0.0) if True in on_device else None


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_only_the_moves_of_the_table_are_made(before: State, after: State) -> None:
    adapter = adapter_in(before)
    settle(adapter, after)
    if (before, after) in TRANSITIONS:
        adapter.move(after)
        assert adapter.state is after
    else:
        with pytest.raises(AssertionError, match=f"version 1: {before} → {after}"):
            adapter.move(after)
        assert adapter.state is before


def test_bytes_must_be_where_the_state_says() -> None:
    with pytest.raises(AssertionError, match="host"):
        adapter_in(State.FETCHING).move(State.ON_HOST)
    with pytest.raises(AssertionError, match="device"):
        adapter_in(State.ON_HOST).move(State.LOADING)
    with pytest.raises(AssertionError, match="device"):
        adapter_in(State.RESIDENT).move(State.ON_HOST)
    adapter = adapter_in(State.RESIDENT)
    adapter.refs = 1
    settle(adapter, State.ON_HOST)
    with pytest.raises(AssertionError, match="in use"):
        adapter.move(State.ON_HOST)


def test_every_state_can_be_reached_and_left() -> None:
    reached = {after for _, after in TRANSITIONS}
    left = {before for before, _ in TRANSITIONS}
    assert reached | {State.REGISTERED} == set(State)
    assert left | {State.GONE} == set(State)


def test_the_docs_draw_the_table() -> None:
    """If not: python scripts/lifecycle_diagram.py"""
    script = script_of("lifecycle_diagram.py")
    assert script.written(script.DOCS.read_text()) == script.diagram()


def script_of(name: str) -> ModuleType:
    path = Path(__file__).parents[3] / "scripts" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
