"""Adapters replaced while requests run on them, over an engine whose answers show which version wrote which KV.

Covers `scheduling/page_namespaces.py`, `scheduling/waiting_queue.py`.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from fakes.engine import after, answer, make_engine, only, token_of
from fakes.engine_driver import Stepper
from fakes.tiers import FakeFile, FakeTiers

from multilora.engine.messages import (
    Finished,
    LoadAdapter,
    Output,
    ReplaceAdapter,
    Reply,
    Submit,
    UnloadAdapter,
)
from multilora.errors import AdapterError
from multilora.memory.page_pool import PageKind
from multilora.params import Composition, SamplingParams

PROMPT = [5, 7, 11, 3, 9, 8, 1, 20, 13, 4]


class World(Stepper):
    """Adapters of these files are loaded, versions 1, 2, …"""

    def __init__(self, *files: FakeFile, ahead: bool = False, tiers: dict[str, Any] | None = None, **options: Any):
        self.files = {f"/{i}": file for i, file in enumerate(files or (FakeFile(),) * 3, 1)}
        self.tiers = FakeTiers(self.files, **({"total_pages": 60} | (tiers or {})))
        self.engine = make_engine(self.tiers, ahead=ahead, **options)
        self.scheduler = self.engine.scheduler
        self.tokens: dict[str, list[int]] = {}
        self.switches: dict[str, list[tuple[int, int, int]]] = {}
        self.input_logprobs: dict[str, list[float | None]] = {}
        self.ended: dict[str, Finished] = {}
        self.replies: dict[int, Reply] = {}
        for version, path in enumerate(self.files, 1):
            self.engine.handle(LoadAdapter(call=version, version=version, path=path))
        while len(self.replies) < len(self.files):
            self.step()

    def submit(self, rid: str, version: int | Composition = 1, count: int = 12, **fields: Any) -> None:
        sampling = SamplingParams(max_new_tokens=count, ignore_eos=True)
        adapters = only(version) if isinstance(version, int) else version
        message = {"input_ids": PROMPT} | fields
        self.tokens[rid], self.switches[rid] = [], []
        self.engine.handle(Submit(rid=rid, sampling=sampling, adapters=adapters, **message))

    def until(self, rid: str, tokens: int) -> None:
        while len(self.tokens[rid]) < tokens:
            self.step()

    def replace(self, old: int, new: int, *, unload: bool = True) -> None:
        """As the front does."""
        self.engine.handle(ReplaceAdapter(100 + old, old, new))
        if unload:
            self.engine.handle(UnloadAdapter(200 + old, old))

    def take(self, output: Output) -> None:
        self.tokens[output.rid] += output.token_ids
        if output.input_logprobs:
            self.input_logprobs[output.rid] = [x and x.logprob for x in output.input_logprobs]
        if output.switch is not None:
            self.switches[output.rid].append((output.switch.start, output.switch.old, output.switch.new))
        if output.finished is not None:
            self.ended[output.rid] = output.finished

    def reply(self, reply: Reply) -> None:
        assert reply.ok, reply
        self.replies[reply.call] = reply

    def at_rest(self) -> None:
        """All have ended, and what they held is free."""
        self.run()
        assert self.tokens.keys() == self.ended.keys()
        assert self.tiers.pool.count(PageKind.KV) == 0


def mixed(*spans: tuple[int, Composition], prompt: Sequence[int] = PROMPT) -> list[int]:
    """The answer of which each span of so many tokens comes from those adapters, over the KV of all before it."""
    state, tokens, ids = 0, [], list(prompt)
    for token in prompt[:-1]:
        state = after(state, token, spans[0][1])
    for count, adapters in spans:
        for _ in range(count):
            state = after(state, ids[-1], adapters)
            ids.append(token_of(state))
            tokens.append(ids[-1])
    return tokens


def renewed(before: list[int], rest: int, version: int) -> list[int]:
    """`before`, then what the version alone gives after it."""
    return before + answer(PROMPT + before, only(version), rest, ignore_eos=True).tokens


@pytest.mark.parametrize("ahead", [False, True])
def test_a_running_request_goes_on_with_the_new_weights_over_the_kv_it_has(ahead: bool) -> None:
    world = World(ahead=ahead)
    world.submit("r")
    world.submit("other", 3)
    world.until("r", 5)
    world.replace(1, 2)
    world.at_rest()
    [(start, old, new)] = world.switches["r"]
    assert (start, old, new) == (5 + ahead, 1, 2), "the token in flight is still the old one's"
    assert world.tokens["r"] == mixed((start, only(1)), (12 - start, only(2)))
    assert world.tokens["other"] == mixed((12, only(3)))
    assert world.switches["other"] == []
    assert not world.engine.adapters.known(1)


def test_a_request_without_a_token_begins_anew() -> None:
    """In the middle of its prompt, and before it: the answer and the prompt's logprobs are the successor's."""
    world = World(chunk_tokens=4, max_running=1)
    for rid in ("runs", "waits"):
        world.submit(rid, return_logprob=True, logprob_start_len=0)
    world.step(2)
    assert world.scheduler.running[0].progress.num_computed == 8
    world.replace(1, 2)
    world.at_rest()
    right = answer(PROMPT, only(2), 12, ignore_eos=True)
    for rid in ("runs", "waits"):
        assert world.switches[rid] == [(0, 1, 2)]
        assert world.tokens[rid] == right.tokens
        assert world.input_logprobs[rid] == [None, *right.prompt_logprobs]


@pytest.mark.parametrize("tiers", [{"max_loras_per_batch": 1}, {"max_device_pages": 1}])
def test_without_room_for_both_the_kv_is_computed_anew(tiers: dict[str, Any]) -> None:
    world = World(FakeFile(), FakeFile(), tiers=tiers)
    world.submit("r")
    world.until("r", 5)
    world.replace(1, 2)
    world.at_rest()
    assert world.switches["r"] == [(5, 1, 2)]
    assert world.tokens["r"] == renewed(mixed((5, only(1))), 7, 2)


def test_while_the_successor_is_on_its_way_nothing_comes_from_the_old_version() -> None:
    world = World(tiers={"copy_delay": lambda: 5})
    world.submit("r")
    world.submit("other", 3)
    world.until("r", 3)
    others = len(world.tokens["other"])
    world.replace(1, 2)
    world.step(3)
    assert (len(world.tokens["r"]), world.switches["r"]) == (3, [])
    assert len(world.tokens["other"]) == others + 3, "others go on"
    world.at_rest()
    assert world.switches["r"] == [(3, 1, 2)]
    assert world.tokens["r"] == mixed((3, only(1)), (9, only(2)))


def test_a_request_that_is_preempted_later_resumes_on_the_successor() -> None:
    world = World()
    world.submit("r")
    world.until("r", 4)
    world.replace(1, 2)
    world.until("r", 7)
    world.scheduler.retract()
    world.at_rest()
    assert world.tokens["r"] == renewed(mixed((4, only(1)), (3, only(2))), 5, 2)


def test_a_request_that_was_preempted_resumes_on_the_successor() -> None:
    world = World()
    world.submit("r")
    world.until("r", 4)
    world.scheduler.retract()
    world.replace(1, 2)
    world.at_rest()
    assert world.switches["r"] == [(4, 1, 2)]
    assert world.tokens["r"] == renewed(mixed((4, only(1))), 8, 2)


def test_kv_of_two_versions_is_never_shared() -> None:
    world = World()
    world.submit("r", count=30)
    world.until("r", 6)
    world.replace(1, 2)
    world.at_rest()
    whole = PROMPT + world.tokens["r"]
    assert len(whole) > 4 * world.tiers.prefix.page_size
    for version in (1, 2):
        assert world.tiers.prefix.match(whole, lambda _, n=version + 1: n, len(whole)) == []
    world.submit("again", 2, input_ids=whole)
    world.at_rest()
    assert world.tokens["again"] == answer(whole, only(2), 12, ignore_eos=True).tokens


def test_the_old_versions_pages_stay_until_their_holders_end() -> None:
    """Several requests share a prefix; the version is unloaded before they end."""
    world = World()
    for rid in "abc":
        world.submit(rid)
        world.until(rid, 1)
    world.replace(1, 2)
    world.step(2)
    assert not world.engine.adapters.known(1)
    world.submit("new", 2)
    world.at_rest()
    for rid in "abc":
        start = world.switches[rid][0][0]
        assert world.tokens[rid] == mixed((start, only(1)), (12 - start, only(2)))
    assert world.tokens["new"] == mixed((12, only(2)))


def test_replacements_follow_each_other() -> None:
    world = World(ahead=True)
    world.submit("r")
    world.until("r", 3)
    world.replace(1, 2)
    world.replace(2, 3)  # before any step on 2
    world.at_rest()
    [(start, old, new)] = world.switches["r"]
    assert (old, new) == (1, 3)
    assert world.tokens["r"] == mixed((start, only(1)), (12 - start, only(3)))
    assert [v for v in (1, 2, 3) if world.engine.adapters.known(v)] == [3]


def test_a_request_that_comes_later_on_the_old_version_follows() -> None:
    world = World()
    world.replace(1, 2, unload=False)
    world.submit("late")
    world.at_rest()
    assert world.switches["late"] == [(0, 1, 2)]
    assert world.tokens["late"] == mixed((12, only(2)))


def test_a_part_of_a_composition() -> None:
    world = World()
    world.submit("sum", ((1, 0.5), (3, 2.0)))
    world.until("sum", 4)
    world.replace(1, 2)
    world.at_rest()
    assert world.tokens["sum"] == mixed((4, ((1, 0.5), (3, 2.0))), (8, ((2, 0.5), (3, 2.0))))


def test_who_cannot_change_finishes_and_the_unload_waits() -> None:
    """The successor acts from another token on; or with it the request would not fit."""
    for successor in (FakeFile(invocation_tokens=(7,)), FakeFile(rank=8 * 9)):
        world = World(FakeFile(), successor, tiers={"total_pages": 15})
        world.submit("r", count=22)
        world.until("r", 3)
        world.replace(1, 2)
        world.step(3)
        assert world.engine.adapters.known(1)
        assert 201 not in world.replies
        world.at_rest()
        assert world.switches["r"] == []
        assert world.tokens["r"] == mixed((22, only(1)))
        assert 201 in world.replies
        assert not world.engine.adapters.known(1)


def test_a_successor_that_cannot_be_brought_back_leaves_the_running_ones_alone() -> None:
    world = World(tiers={"max_loaded_loras": 1})
    world.submit("r")
    world.until("r", 3)
    world.files["/2"].error = AdapterError("the disk is gone")
    world.submit("waits", 2)
    world.replace(1, 2, unload=False)
    world.at_rest()
    assert world.tokens["r"] == mixed((12, only(1)))
    assert world.ended["waits"].type == "error"


def test_nothing_is_replaced_while_frozen_and_the_first_step_after_it_is_new() -> None:
    world = World()
    world.submit("r")
    world.until("r", 3)
    world.scheduler.pause.mode = "keep"
    world.replace(1, 2)
    world.step()
    assert 101 in world.replies
    world.scheduler.pause.mode = None
    world.at_rest()
    assert world.switches["r"] == [(3, 1, 2)]
    assert world.tokens["r"] == mixed((3, only(1)), (9, only(2)))


def test_versions_that_are_not_there_are_refused() -> None:
    world = World()
    world.engine.handle(ReplaceAdapter(77, 1, 9))
    with pytest.raises(AssertionError, match="adapter version 9 does not exist"):
        world.step()
