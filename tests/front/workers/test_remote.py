"""A worker's front: names as the supervisor says them, questions in place of a registry of its own.

Covers `workers/messages.py` too.
"""

import pytest
from fakes.models import FakeEngineClient
from fakes.tokenizers import byte_level_tokenizer

from multilora.config import Config
from multilora.engine.messages import AdapterInfo, AdapterSwitch, Output
from multilora.errors import UnknownAdapter
from multilora.front.access import CALLER, Caller, Limits, Tenant
from multilora.front.adapter_ref import RefState
from multilora.front.admission import Wanted
from multilora.front.effects import Ask
from multilora.front.observer import Ending, FirstOutput, Observer, Origin
from multilora.front.versions import VersionLabel
from multilora.front.workers.messages import (
    Answer,
    HoldAdapters,
    NameRow,
    NamesChanged,
    Observed,
    OpenSamples,
    SampleRow,
    TokenTimes,
    decode_from_worker,
    encode,
)
from multilora.front.workers.remote import WorkerFront

TENANT = Caller(key_id="k", tenant=Tenant("acme", 3, None, ("/a",)), use=("a*",), limits=Limits(5, None, 2))


class Link(FakeEngineClient):
    """An engine client that notes what else a worker says to its supervisor."""

    def __init__(self):
        super().__init__(vocab_size=320)
        self.label = VersionLabel("new", 2)
        self.ended = []
        self.released = []

    def end(self, key):
        self.ended.append(key)

    def release(self, hold):
        self.released.append(hold)


def front(link, tmp_path=None):
    config = Config.make(served_model_name="base", enable_lora=True)
    return WorkerFront(config, link, byte_level_tokenizer(), Observer())


def info(version, path="/adapters/a", **fields):
    return AdapterInfo(version=version, path=path, rank=8, target_modules=[], nbytes=1, pages=1, **fields)


def row(version, state=RefState.LOADED, name="a", **fields):
    return NameRow(name=name, path="/adapters/a", version=version, pinned=False, state=state, **fields)


def changed(*rows, weight_version="default"):
    return NamesChanged(seq=1, rows=list(rows), weight_version=weight_version)


def answer_to(steps, answer):
    """The question that work asks first, and its result when that is answered."""
    effect = next(steps)
    assert isinstance(effect, Ask)
    with pytest.raises(StopIteration) as stop:
        steps.send(answer)
    return effect, stop.value.value


def test_names_follow_the_supervisors():
    f = front(Link())
    f.apply(changed(row(1, info=info(1)), weight_version="step-1"))
    assert f.registry.resolve_model("a") == (("a", 1.0),) and f.registry.weight_version == "step-1"
    f.apply(changed(row(2, info=info(2)), row(1, RefState.REPLACED)))
    assert f.registry.sole_version((("a", 1.0),)) == 2 and not f.registry.knows(1)
    f.apply(changed(row(1, RefState.GONE)))
    assert f.registry.knows(2)
    f.apply(changed(row(2, RefState.UNLOADING)))
    f.apply(changed(row(2, RefState.LOADED)))
    assert f.registry.loaded() == {"a": "/adapters/a"}
    f.apply(changed(row(2, RefState.GONE)))
    with pytest.raises(UnknownAdapter):
        f.registry.resolve_model(None, (("a", 1.0),))


def test_tokens_of_an_adapter_are_looked_for_before_its_name_counts(tmp_path):
    f = front(Link())
    plain, own = row(1, info=info(1)), row(2, name="b", info=info(2, str(tmp_path / "gone"), vocab_size=330))
    assert list(f.unread(changed(plain, own))) == [own]
    f.read_tokens(own)
    f.apply(changed(plain, own))
    assert list(f.unread(changed(own))) == []
    vocabulary = f.vocabularies.of_version(2)
    assert vocabulary.own and vocabulary.size == 330 and "could not be read again" in vocabulary.no_text
    f.apply(changed(row(2, RefState.GONE, name="b")))
    assert f.vocabularies.of_version(2) is f.vocabularies.base


def test_who_may_run_is_asked_for_the_caller_at_hand():
    link = Link()
    f = front(link)
    token = CALLER.set(TENANT)
    try:
        rows = [[SampleRow("r", "r@0", ((1, 1.0),), VersionLabel("w", 1), 1)]]
        effect, [[ticket]] = answer_to(f.admission.open([Wanted((("a", 1.0),))], ["r"]), Answer(call=1, samples=rows))
    finally:
        CALLER.reset(token)
    question = effect.question(7)
    assert question == OpenSamples(call=7, caller=TENANT, wanted=[Wanted((("a", 1.0),))], rids=["r"])
    assert decode_from_worker(encode(question)) == question
    assert (ticket.key, ticket.caller, ticket.held.composition) == ("r@0", TENANT, ((1, 1.0),))
    assert ticket.held.label == VersionLabel("w", 1) and ticket.sole_version == 1
    effect.undo(Answer(call=1, samples=rows))
    f.admission.end(ticket)
    assert link.ended == ["r@0", "r@0"]


def test_a_sample_that_changes_its_version_has_its_new_label_before_its_output():
    f, seen = front(Link()), []
    rows = [[SampleRow("r", "r@0", (), VersionLabel("old", 1), None)]]
    _, [[ticket]] = answer_to(f.admission.open([Wanted(())], None), Answer(call=1, samples=rows))
    f.admission._take(ticket, lambda output: seen.append(ticket.held.label), Output(rid="r@0", token_ids=[1]))
    switch = Output(rid="r@0", switch=AdapterSwitch(1, 1, 2))
    f.admission._take(ticket, lambda output: seen.append(ticket.held.label), switch)
    assert seen == [VersionLabel("old", 1), VersionLabel("new", 2)]


def test_what_the_resolver_holds_is_released_by_its_number():
    link = Link()
    f = front(link)
    effect, held = answer_to(f.resolver.hold(["x"]), Answer(call=1, hold=5))
    assert isinstance(effect.question(1), HoldAdapters)
    f.resolver.release(held)
    effect.undo(Answer(call=1, hold=6))
    assert link.released == [5, 6]
    with pytest.raises(StopIteration) as stop:
        next(f.resolver.hold([]))
    assert stop.value.value == ()


def test_counts_can_travel():
    first = FirstOutput(seconds=1.5, queue_seconds=0.5, prompt_tokens=3, cached_tokens=0, generated=1)
    ending = Ending(
        reason="stop",
        error="",
        prompt_tokens=3,
        generated=2,
        n=1,
        max_tokens=None,
        seconds=2.0,
        first_seconds=1.5,
        queue_seconds=0.5,
    )
    origin = Origin("a", "acme")
    observed = Observed(
        call=3,
        submitted=[origin],
        first=[(origin, first)],
        later=[(origin, TokenTimes([0, 1], 0.5))],
        ended=[(origin, ending)],
        refused=[(origin, "QueueFull")],
        http=[("/generate", "POST", 200, 0.1)],
    )
    assert decode_from_worker(encode(observed)) == observed
