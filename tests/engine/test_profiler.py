"""Profiles of the engine: begun and ended between steps, written as traces, never in the way of a step."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from fakes.engine import make_engine
from fakes.tiers import FakeTiers

from multilora.engine.engine import Engine
from multilora.engine.messages import Outputs, Reply, StartProfile, StopProfile, Submit
from multilora.params import SamplingParams


def engine() -> Engine:
    return make_engine(FakeTiers({}, total_pages=64))


def start(e: Engine, path: Path, **fields) -> Reply:
    e.handle(StartProfile(**({"call": 1, "path": str(path), "activities": ["CPU"], "with_stack": False} | fields)))
    return reply(e)


def stop(e: Engine) -> Reply:
    e.handle(StopProfile(2))
    return reply(e)


def reply(e: Engine) -> Reply:
    (found,) = [message for message in e.step() if isinstance(message, Reply)]
    return found


def run(e: Engine, tokens: int) -> int:
    """Generate, each token a step. Returns how many tokens came."""
    sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    e.handle(Submit(rid=f"r{e.scheduler.launched}", input_ids=[3, 4], sampling=sampling))
    came = 0
    while e.busy:
        came += sum(len(o.token_ids) for m in e.step() if isinstance(m, Outputs) for o in m.items)
    return came


def trace(path: Path) -> list:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_from_start_to_stop(tmp_path):
    e, path = engine(), tmp_path / "new" / "a.trace.json.gz"
    assert start(e, path).ok
    assert run(e, 3) == 3
    assert not path.exists()
    assert stop(e).ok
    assert trace(path)


def test_a_number_of_steps_ends_by_itself(tmp_path):
    e, path = engine(), tmp_path / "a.trace.json.gz"
    assert start(e, path, num_steps=2).ok
    assert run(e, 2) == 2
    assert not path.exists()
    assert run(e, 1) == 1
    assert trace(path)
    assert "no profile is running" in stop(e).message
    assert start(e, tmp_path / "b.trace.json.gz").ok
    assert stop(e).ok


def test_it_begins_with_a_later_step(tmp_path):
    e, path = engine(), tmp_path / "a.trace.json.gz"
    assert start(e, path, start_step=5, num_steps=1).ok
    assert run(e, 4) == 4
    early = stop(e)
    assert not early.ok
    assert "step 5" in early.message
    assert start(e, path, start_step=6, num_steps=1).ok
    assert run(e, 4) == 4
    assert trace(path)


def test_one_at_a_time(tmp_path):
    e = engine()
    assert not stop(e).ok
    assert start(e, tmp_path / "a.trace.json.gz").ok
    again = start(e, tmp_path / "b.trace.json.gz")
    assert (again.ok, again.kind) == (False, "BadRequest")
    assert stop(e).ok
    assert not (tmp_path / "b.trace.json.gz").exists()


def test_a_trace_that_cannot_be_written_stops_no_step(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.trace.json.gz"
    e = engine()
    assert start(e, path, num_steps=1).ok
    assert run(e, 3) == 3
    assert start(e, path).ok
    failed = stop(e)
    assert not failed.ok
    assert str(path) in failed.message
    assert run(e, 1) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be recorded here")
def test_only_what_is_not_there_is_refused(tmp_path):
    e = engine()
    assert "activities" in start(e, tmp_path / "a", activities=["GPU"]).message
    assert start(e, tmp_path / "a.trace.json.gz", activities=["CPU", "GPU"]).ok
    assert stop(e).ok
