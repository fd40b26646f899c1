"""What the next engine is given, and who is told what when one ends."""

import pytest

from multilora.engine.messages import (
    AdapterSwitch,
    Finished,
    Output,
    Pause,
    PauseState,
    ReplaceAdapter,
    Reply,
    Resume,
    Sleep,
    Submit,
    WakeUp,
)
from multilora.engine.process.book import MAX_RUNS, EngineBook
from multilora.params import SamplingParams

ASLEEP = Reply(call=1, pause=PauseState(mode="keep", sleeping=True, released=["weights"]))


def submit(book: EngineBook, rid: str = "r") -> list[Output]:
    told: list[Output] = []
    book.open(Submit(rid=rid, input_ids=[1], sampling=SamplingParams()), told.append)
    return told


def test_a_request_that_has_said_nothing_just_stays() -> None:
    book = EngineBook()
    told = submit(book)
    book.interrupt("it ended")
    assert told == [] and list(book.requests) == ["r"]


def test_one_that_has_said_something_takes_it_back_once() -> None:
    book = EngineBook()
    told = submit(book)
    book.requests["r"].take(Output(rid="r", token_ids=[5]))
    book.interrupt("it ended")
    book.interrupt("it ended again, before this one ran")
    assert [output.again for output in told] == [False, True]


def test_one_that_is_there_when_engines_end_again_and_again_ends_too() -> None:
    book = EngineBook()
    told = submit(book)
    for _ in range(MAX_RUNS):
        book.requests["r"].runs += 1
        book.interrupt("it ended")
    assert book.requests == {}
    assert [o.finished and o.finished.kind for o in told] == ["EngineDead"]
    assert "the one before it" in told[0].finished.message


def test_what_an_engine_says_of_its_own_end_is_not_passed_on() -> None:
    book = EngineBook()
    told = submit(book)
    book.requests["r"].take(Output(rid="r", finished=Finished(type="error", kind="EngineDead")))
    assert told == [] and list(book.requests) == ["r"]
    book.end_all("no more")
    assert [o.finished.message for o in told] == ["no more"] and book.requests == {}


def test_an_ending_closes_the_entry() -> None:
    book = EngineBook()
    told = submit(book)
    request = book.requests["r"]
    request.take(Output(rid="r", token_ids=[5], finished=Finished(type="length")))
    request.take(Output(rid="r", finished=Finished(type="abort")))
    assert len(told) == 1 and book.requests == {}


@pytest.mark.parametrize(
    ("calls", "kept"),
    [
        ([Pause(call=1, mode="keep", queues=True)], [Pause]),
        ([Pause(call=1, mode="keep", queues=True), Resume(2)], []),
        ([Sleep(call=1, level=1, tags=["weights"], mode="keep")], [Sleep]),
        ([Sleep(call=1, level=1, tags=["weights"], mode=None)] * 3, [Sleep]),
        (
            [Pause(call=1, mode="keep", queues=True), Sleep(call=2, level=1, tags=["weights"], mode=None)],
            [Pause, Sleep],
        ),
    ],
)
def test_calls_that_outlast_an_engine(calls: list, kept: list) -> None:
    book = EngineBook()
    for call in calls:
        book.note_call(call, ASLEEP)
    assert [type(message) for message in book.pauses] == kept


@pytest.mark.parametrize(("mode", "kept"), [(None, []), ("keep", [Pause])])
def test_waking_up_leaves_the_pause_that_was_there_before(mode: str | None, kept: list) -> None:
    book = EngineBook()
    book.note_call(Pause(call=1, mode="keep", queues=True), ASLEEP)
    book.note_call(Sleep(call=2, level=1, tags=["weights", "kv_cache"], mode=None), ASLEEP)
    book.note_call(WakeUp(3, ["weights"]), ASLEEP)
    assert [type(message) for message in book.pauses] == [Pause, Sleep, WakeUp]
    book.note_call(WakeUp(4, ["kv_cache"]), Reply(call=4, pause=PauseState(mode=mode)))
    assert [type(message) for message in book.pauses] == kept


def test_requests_on_a_replaced_version_run_again_on_its_latest_successor() -> None:
    book = EngineBook()
    told: list[Output] = []
    adapters = ((1, 1.0), (9, 0.5))
    book.open(Submit(rid="r", input_ids=[1], sampling=SamplingParams(), adapters=adapters), told.append)
    book.note_call(ReplaceAdapter(1, 1, 2), Reply(call=1))
    book.note_call(ReplaceAdapter(2, 2, 3), Reply(call=2))
    book.remove_adapter(1)
    book.interrupt("it ended")
    assert [output.switch for output in told] == [AdapterSwitch(0, 1, 3)]
    assert book.requests["r"].message.adapters == ((3, 1.0), (9, 0.5))
    book.requests["r"].take(Output(rid="r", switch=AdapterSwitch(4, 9, 10)))
    book.interrupt("it ended again")
    assert book.requests["r"].message.adapters == ((3, 1.0), (10, 0.5)), "as the engine had said"
    assert [o.switch for o in told if o.switch and o.switch.start == 0] == [AdapterSwitch(0, 1, 3)]
    book.requests["r"].end(Finished(type="length"))
    book.remove_adapter(2)
    assert book._successors == {}, "nothing is kept for ever"
