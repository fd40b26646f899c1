"""What the scheduler promises, one promise a test. Fakes as in `tests/support/fakes/engine.py`.

Covers `scheduling/chunks.py` too.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from fakes.engine import EOS, VOCAB, FakeForward, FakeLaunched, answer, make_engine, only, rids_of
from fakes.engine_driver import Stepper
from fakes.tiers import FakeFile, FakeTiers

from multilora.engine.messages import Abort, Finish, LoadAdapter, Output, Submit
from multilora.engine.plan import StepPlan, StepResult
from multilora.errors import AdapterError
from multilora.params import SamplingParams

PAGE = 4


def tiers(**options: Any) -> FakeTiers:
    return FakeTiers(options.pop("files", {}), **({"total_pages": 64, "page_size": PAGE} | options))


class Driver(Stepper):
    """Remembers the plans of an engine as {rid: token count} and what each request heard."""

    def __init__(self, tiers: FakeTiers, **options: Any):
        self.now = 0.0
        self.tiers = tiers
        self.engine = make_engine(tiers, clock=lambda: self.now, **options)
        self.scheduler = self.engine.scheduler
        self.runner = self.engine.runner
        self.plans: list[dict[str, int]] = []
        self.heard: dict[str, list[Output]] = {}
        self.ended: list[str] = []
        self._plan = self.scheduler.plan
        self.scheduler.plan = self._planned  # type: ignore[method-assign]

    def _planned(self) -> StepPlan | None:
        plan = self._plan()
        rids = rids_of(self.engine, plan) if plan else []
        self.plans.append({rid: c.count for rid, c in zip(rids, plan.chunks if plan else (), strict=True)})
        return plan

    def submit(self, rid: str, prompt: list[int], max_new_tokens: int = 4, adapter: int | None = None, **fields: Any):
        adapters = fields.pop("adapters", only(adapter))
        sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=fields.pop("ignore_eos", True))
        self.engine.handle(Submit(rid=rid, input_ids=prompt, sampling=sampling, adapters=adapters, **fields))

    def load(self, *versions: int) -> None:
        """From the paths "/1", "/2", …, whatever the delays."""
        for version in versions:
            self.engine.handle(LoadAdapter(call=version, version=version, path=f"/{version}"))
        self.run()

    def take(self, output: Output) -> None:
        self.heard.setdefault(output.rid, []).append(output)
        if output.finished is not None:
            self.ended.append(output.rid)

    def check(self) -> None:
        self.tiers.check()

    def tokens(self, rid: str) -> list[int]:
        return [t for output in self.heard[rid] for t in output.token_ids]

    def input_logprobs(self, rid: str) -> list[float | None]:
        return [x and x.logprob for x in self.heard[rid][0].input_logprobs]

    @property
    def rows_wasted(self) -> int:
        """Tokens sampled for requests that had ended."""
        return self.runner.tokens_sampled - sum(len(self.tokens(rid)) for rid in self.heard)

    def first_planned(self, rid: str) -> int:
        return next(i for i, plan in enumerate(self.plans) if rid in plan)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 7 + i * i + 3 * i) % VOCAB for i in range(length)]


# ---------------------------------------------------------------------- order


def test_first_come_first_served():
    driver = Driver(tiers(), max_running=1)
    for i, rid in enumerate("abc"):
        driver.submit(rid, prompt(5, seed=i), max_new_tokens=3)
    driver.run()
    assert driver.ended == ["a", "b", "c"]


@pytest.mark.parametrize(("policy", "order"), [("fcfs", ["cold", "warm"]), ("lpm", ["warm", "cold"])])
def test_lpm_takes_the_longest_cached_prefix_first(policy, order):
    driver = Driver(tiers(), max_running=1, policy=policy)
    driver.submit("first", prompt(16))
    driver.run()
    driver.submit("cold", prompt(16, seed=5))
    driver.submit("warm", prompt(16))
    driver.run()
    assert driver.ended[1:] == order
    assert driver.heard["warm"][0].cached_tokens == 12


@pytest.mark.parametrize(("policy", "order"), [("fcfs", "abcd"), ("priority", "dbac")])
def test_priorities_count_only_under_their_policy(policy, order):
    driver = Driver(tiers(), max_running=1, policy=policy)
    for rid, priority in [("a", 0), ("b", -1), ("c", 5), ("d", -7)]:
        driver.submit(rid, prompt(5), priority=priority)
    driver.run()
    assert "".join(driver.ended) == order


def test_a_request_whose_adapter_is_on_its_way_is_passed_by():
    world = tiers(files={"/1": FakeFile()}, copy_delay=lambda: 3)
    driver = Driver(world)
    driver.load(1)
    driver.submit("adapter", prompt(5), adapter=1)
    driver.submit("base", prompt(5, seed=1))
    driver.run()
    assert driver.first_planned("base") == driver.first_planned("adapter") - 3


def test_who_has_waited_too_long_is_overtaken_no_more():
    delay = [0]
    world = tiers(files={"/1": FakeFile()}, copy_delay=lambda: delay[0])
    driver = Driver(world, max_wait=5.0)
    driver.load(1)
    delay[0] = 30
    driver.submit("old", prompt(5), adapter=1)
    for i in range(60):
        driver.submit(f"young {i}", prompt(5, seed=i), max_new_tokens=1)
        driver.step()
        driver.now += 0.5
    driver.run()
    overtook = [i for i in range(60) if driver.first_planned(f"young {i}") < driver.first_planned("old")]
    assert overtook == list(range(11))  # those that were planned by second 5.0


def test_lpm_lets_nobody_starve():
    driver = Driver(tiers(), max_running=1, policy="lpm", max_wait=5.0)
    driver.submit("cold", prompt(9, seed=3))
    for i in range(40):
        driver.submit(f"warm {i}", prompt(9), max_new_tokens=1)
        driver.submit(f"also warm {i}", prompt(9), max_new_tokens=1)
        driver.step()
        driver.now += 0.5
    assert "cold" in driver.ended


# ---------------------------------------------------------------------- limits of a step


def test_prompts_share_the_chunk_budget_and_decodes_cost_nothing():
    driver = Driver(tiers(), chunk_tokens=16)
    driver.submit("decoding", prompt(4), max_new_tokens=8)
    driver.step()
    driver.submit("long", prompt(40, seed=1))
    driver.submit("short", prompt(10, seed=2))
    driver.step(4)
    assert driver.plans[1:] == [
        {"decoding": 1, "long": 16},
        {"decoding": 1, "long": 16},
        {"decoding": 1, "long": 8, "short": 8},
        {"decoding": 1, "long": 1, "short": 2},
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_any_chunking_gives_the_same_answer(chunk, length, ahead):
    driver = Driver(tiers(), chunk_tokens=chunk, ahead=ahead)
    for wanted in (0, 1, 5):
        driver.submit(f"{wanted}", prompt(length, seed=wanted), max_new_tokens=wanted)
    driver.run()
    for wanted in (0, 1, 5):
        assert driver.tokens(f"{wanted}") == answer(prompt(length, seed=wanted), (), wanted, True).tokens
        assert driver.heard[f"{wanted}"][-1].finished.type == "length"


def test_no_more_requests_than_max_running():
    driver = Driver(tiers(), max_running=3)
    for i in range(8):
        driver.submit(f"{i}", prompt(3, seed=i))
    driver.run()
    assert max(len(plan) for plan in driver.plans) == 3


def test_more_adapters_than_the_batch_may_hold_are_served_in_rounds():
    files = {f"/{i}": FakeFile() for i in range(1, 6)}
    driver = Driver(tiers(files=files, max_loras_per_batch=2), max_running=16, chunk_tokens=64)
    driver.load(1, 2, 3, 4, 5)
    for version in range(1, 6):
        driver.submit(f"{version}", prompt(5), adapter=version)
        driver.submit(f"base {version}", prompt(5, seed=version))
    driver.run()
    for plan in driver.plans:
        assert len([rid for rid in plan if not rid.startswith("base")]) <= 2
    assert all(driver.first_planned(f"base {v}") <= driver.first_planned("1") for v in range(1, 6))
    for version in range(1, 6):
        assert driver.tokens(f"{version}") == answer(prompt(5), only(version), 4, True).tokens


def test_chunks_are_ordered_by_adapter_base_first():
    files = {f"/{i}": FakeFile() for i in range(1, 4)}
    driver = Driver(tiers(files=files))
    driver.load(1, 2, 3)
    for rid, version in (("a", 3), ("b", None), ("c", 1), ("d", 3), ("e", 1), ("f", None)):
        driver.submit(rid, prompt(3), adapter=version)
    driver.step()
    assert list(driver.plans[-1]) == ["b", "f", "c", "e", "a", "d"]


# ---------------------------------------------------------------------- when pages run out


def test_the_youngest_gives_way_and_the_oldest_goes_on():
    driver = Driver(tiers(total_pages=8))
    driver.submit("old", prompt(8), max_new_tokens=20)
    driver.submit("young", prompt(8, seed=1), max_new_tokens=20)
    driver.run()
    assert driver.scheduler.preemptions >= 1
    assert driver.ended == ["old", "young"]
    alone = [i for i, plan in enumerate(driver.plans) if plan == {"old": 1}]
    assert alone, "the young one was never set aside"
    assert all("old" in plan for plan in driver.plans[: alone[-1]])
    for rid, seed in (("old", 0), ("young", 1)):
        assert driver.tokens(rid) == answer(prompt(8, seed=seed), (), 20, True).tokens


@pytest.mark.parametrize("ahead", [False, True])
def test_the_oldest_finishes_even_if_it_needs_every_page(ahead):
    driver = Driver(tiers(files={"/1": FakeFile(rank=16)}, total_pages=10), ahead=ahead)
    driver.load(1)
    driver.submit("old", prompt(12), max_new_tokens=20, adapter=1)  # 8 pages, and 2 of the adapter
    for i in range(4):
        driver.submit(f"{i}", prompt(6, seed=i), max_new_tokens=6)
    driver.run()
    assert driver.tokens("old") == answer(prompt(12), only(1), 20, True).tokens
    assert len(driver.ended) == 5


def test_a_preempted_request_waits_for_its_token_in_flight():
    driver = Driver(tiers(), ahead=True)
    driver.submit("a", prompt(6), max_new_tokens=6)
    driver.step(2)  # its first token is being sampled
    request = driver.scheduler.get("a")
    assert request.progress.in_flight == 1
    driver.scheduler._preempt(request)
    driver.step()
    assert driver.plans[-1] == {}
    assert len(request.progress.output_ids) == 2
    driver.run()
    assert driver.tokens("a") == answer(prompt(6), (), 6, True).tokens


def test_prompt_logprobs_survive_a_preemption_in_mid_prompt():
    driver = Driver(tiers(), ahead=True, chunk_tokens=4)
    driver.submit("a", prompt(11), return_logprob=True, logprob_start_len=0)
    driver.step()
    driver.scheduler._preempt(driver.scheduler.get("a"))
    driver.run()
    assert driver.plans[:2] == [{"a": 4}, {"a": 4}], "the same tokens again, before the first were committed"
    assert driver.input_logprobs("a") == [None, *answer(prompt(11), (), 0).prompt_logprobs]


# ---------------------------------------------------------------------- one step ahead


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stop_one_step_ahead_wastes_one_row(ahead):
    stops = next(p for p in (prompt(5, seed=s) for s in range(99)) if 2 <= len(answer(p, (), 30).tokens) < 20)
    driver = Driver(tiers(), ahead=ahead)
    driver.submit("a", stops, max_new_tokens=30, ignore_eos=False)
    driver.run()
    assert driver.tokens("a") == answer(stops, (), 30).tokens
    assert driver.tokens("a")[-1] == EOS
    assert driver.heard["a"][-1].finished.matched == EOS
    assert driver.rows_wasted == ahead


def test_a_known_end_wastes_nothing_one_step_ahead():
    driver = Driver(tiers(), ahead=True)
    driver.submit("a", prompt(5), max_new_tokens=3)
    driver.run()
    assert len(driver.tokens("a")) == 3
    assert driver.rows_wasted == 0
    assert [plan for plan in driver.plans if plan] == [{"a": 5}, {"a": 1}, {"a": 1}]


def test_a_request_id_can_be_used_again_while_its_last_row_is_still_in_flight():
    driver = Driver(tiers(), ahead=True)
    driver.submit("a", prompt(5))
    driver.step(2)
    driver.engine.handle(Finish("a"))
    driver.heard.clear()
    driver.submit("a", prompt(7, seed=1))
    driver.run()
    assert driver.tokens("a") == answer(prompt(7, seed=1), (), 4, True).tokens
    assert driver.ended == ["a"]


# ---------------------------------------------------------------------- endings


@pytest.mark.parametrize("ahead", [False, True])
def test_abort_ends_with_a_message_and_finish_with_silence(ahead):
    driver = Driver(tiers(), ahead=ahead, max_running=2)
    for i, rid in enumerate(("aborted", "dropped", "waiting", "waiting too")):
        driver.submit(rid, prompt(5, seed=i), max_new_tokens=30)
    driver.step(3)
    driver.engine.handle(Abort("aborted", "enough"))
    driver.engine.handle(Finish("dropped"))
    driver.engine.handle(Abort("waiting"))
    driver.engine.handle(Finish("waiting too"))
    driver.engine.handle(Abort("nobody"))
    before = len(driver.heard["dropped"])
    driver.run()
    assert driver.heard["aborted"][-1].finished.type == "abort"
    assert driver.heard["aborted"][-1].finished.message == "enough"
    assert len(driver.heard["dropped"]) == before
    assert driver.heard["dropped"][-1].finished is None
    assert driver.heard["waiting"][-1].finished.type == "abort"
    assert "waiting too" not in driver.heard


def test_an_error_of_the_sampler_ends_only_its_request(monkeypatch):
    driver = Driver(tiers())
    sample = driver.runner.sample

    def broken(forward: FakeForward) -> FakeLaunched:
        launched = sample(forward)
        rids = rids_of(driver.engine, forward.plan)

        def result() -> StepResult:
            found = launched.result()
            sampling = [(rid, c) for rid, c in zip(rids, forward.plan.chunks, strict=True) if c.answer_positions]
            for i, (rid, chunk) in enumerate(sampling):
                if rid == "b" and chunk.answer_positions[0] > 0:
                    found.errors[i] = "the grammar has no way on"
            return found

        return FakeLaunched(forward.plan, result)

    monkeypatch.setattr(driver.runner, "sample", broken)
    driver.submit("a", prompt(5))
    driver.submit("b", prompt(5, seed=1))
    driver.run()
    assert driver.heard["a"][-1].finished.type == "length"
    assert driver.heard["b"][-1].finished.type == "error"
    assert driver.heard["b"][-1].finished.message == "the grammar has no way on"
    assert len(driver.tokens("b")) == 1


def test_a_lost_adapter_ends_who_waits_for_it_and_nobody_else():
    files = {"/1": FakeFile(), "/2": FakeFile()}
    driver = Driver(tiers(files=files, max_loaded_loras=1, max_loras_per_batch=1))
    driver.load(1, 2)
    driver.submit("running", prompt(5), max_new_tokens=20, adapter=2)
    driver.submit("base", prompt(5, seed=1), max_new_tokens=20)
    driver.step()
    files["/1"].error = AdapterError("the disk is gone")
    driver.submit("lost", prompt(5), adapter=1)
    driver.run()
    assert driver.heard["lost"][-1].finished.kind == "AdapterUnavailable"
    assert driver.heard["lost"][-1].finished.message.endswith("cannot be brought back: the disk is gone")
    assert len(driver.tokens("running")) == len(driver.tokens("base")) == 20
    files["/1"].error = None
    driver.submit("back", prompt(5), adapter=1)
    driver.run()
    assert driver.tokens("back") == answer(prompt(5), only(1), 4, True).tokens


# ---------------------------------------------------------------------- prefix cache


def test_requests_share_cached_pages_only_with_those_of_the_same_salt():
    driver = Driver(tiers())
    for rid, salt in [("a", "x"), ("b", "y"), ("c", ""), ("d", "x"), ("e", "y"), ("f", "")]:
        driver.submit(rid, prompt(16), salt=salt)
        driver.run()
    assert [driver.heard[rid][0].cached_tokens for rid in "abcdef"] == [0, 0, 0, 12, 12, 12]
    assert len({tuple(driver.tokens(rid)) for rid in "abcdef"}) == 1


def test_a_prompt_logprob_limits_what_comes_from_the_cache():
    driver = Driver(tiers())
    driver.submit("first", prompt(16))
    driver.run()
    for start, cached in ((-1, 12), (0, 0), (9, 8), (15, 12)):
        rid = f"from {start}"
        driver.submit(rid, prompt(16), return_logprob=True, logprob_start_len=start)
        driver.run()
        assert driver.heard[rid][0].cached_tokens == cached
        right = [None, *answer(prompt(16), (), 0).prompt_logprobs][start:] if start >= 0 else []
        assert driver.input_logprobs(rid) == right


def test_no_prefix_is_shared_between_adapters():
    driver = Driver(tiers(files={"/1": FakeFile(), "/2": FakeFile()}))
    driver.load(1, 2)
    for rid, version in (("base", None), ("one", 1), ("two", 2), ("one again", 1)):
        driver.submit(rid, prompt(16), adapter=version)
        driver.run()
        assert driver.heard[rid][0].cached_tokens == (12 if rid == "one again" else 0)
        assert driver.tokens(rid) == answer(prompt(16), only(version), 4, True).tokens


# ---------------------------------------------------------------------- several adapters

MIX = ((1, 0.5), (2, 1.0), (3, -1.0))


def few(count: int = 5, **options: Any) -> FakeTiers:
    return tiers(files={f"/{i}": FakeFile() for i in range(1, count + 1)}, **options)


def finished(driver: Driver, rid: str) -> Any:
    return driver.heard[rid][-1].finished


def test_equal_compositions_are_neighbours_and_base_comes_first():
    driver = Driver(few())
    driver.load(1, 2, 3)
    wanted = [MIX, (), only(1), MIX[:2], MIX, only(1), ((1, 0.5),), (), MIX[:2]]
    for i, adapters in enumerate(wanted):
        driver.submit(str(i), prompt(3, seed=i), adapters=adapters)
    driver.run()
    for plan in filter(None, driver.plans):
        kinds = [wanted[int(rid)] for rid in plan]
        assert [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]] == sorted(set(kinds))
        assert sum(a != b for a, b in itertools.pairwise(kinds)) == len(set(kinds)) - 1
    for i, adapters in enumerate(wanted):
        assert driver.tokens(str(i)) == answer(prompt(3, seed=i), adapters, 4, True).tokens


@pytest.mark.parametrize("policy", ["lru", "fifo", "cost"])
@pytest.mark.parametrize("ahead", [False, True])
def test_compositions_that_need_each_others_places_all_end(policy, ahead):
    driver = Driver(
        few(max_loras_per_batch=3, policy=policy, copy_delay=lambda: 3, fetch_delay=lambda: 2), ahead=ahead
    )
    driver.load(1, 2, 3, 4, 5)
    mixes = [((a, 0.5), (b, 0.5), (c, 1.0)) for a, b, c in [(1, 2, 3), (3, 4, 5), (1, 4, 5), (2, 3, 4)]]
    jobs = [*mixes, only(1), only(5), *mixes]
    for i, adapters in enumerate(jobs):
        driver.submit(str(i), prompt(5, seed=i), adapters=adapters)
    driver.run()
    for i, adapters in enumerate(jobs):
        assert driver.tokens(str(i)) == answer(prompt(5, seed=i), adapters, 4, True).tokens


def test_a_composition_is_not_overtaken_for_ever():
    """Single places come free all the time, three at once never, unless those who came later wait."""
    driver = Driver(few(max_loras_per_batch=3), max_running=16, max_wait=5.0)
    driver.load(1, 2, 3, 4, 5)
    driver.submit("first", prompt(3), max_new_tokens=10, adapter=4)
    driver.step()
    driver.submit("mix", prompt(3), adapters=MIX)
    for i in range(60):
        driver.submit(f"{i}", prompt(3), max_new_tokens=10, adapter=4 + i % 2)
        driver.now += 0.5
        driver.step()
        if "mix" in driver.ended:
            break
    assert "mix" in driver.ended
    assert driver.now < 20
    driver.run()


def test_a_pin_that_comes_later_may_end_a_composition_that_waits():
    driver = Driver(few(max_loras_per_batch=3))
    driver.load(1, 2, 3, 4)
    driver.submit("running", prompt(3), max_new_tokens=20, adapter=4)
    driver.step()
    driver.submit("mix", prompt(3), adapters=MIX)
    driver.step(3)
    assert "mix" not in driver.heard
    driver.engine.handle(LoadAdapter(call=5, version=5, path="/5", pinned=True))
    driver.run()
    assert driver.tokens("running") == answer(prompt(3), only(4), 20, True).tokens
    assert finished(driver, "mix").kind == "CannotFit"
    assert "leave room for 2 that are not pinned" in finished(driver, "mix").message
    driver.submit("late", prompt(3), adapters=MIX)
    driver.submit("pair", prompt(3), adapters=MIX[:2])
    driver.run()
    assert finished(driver, "late").kind == "CannotFit"
    assert driver.tokens("pair") == answer(prompt(3), MIX[:2], 4, True).tokens


def test_the_error_of_one_part_ends_who_waits_for_the_whole():
    files = {f"/{i}": FakeFile() for i in range(1, 4)}
    driver = Driver(tiers(files=files, max_loras_per_batch=3, max_loaded_loras=1))
    driver.load(1, 2, 3)
    files["/2"].error = AdapterError("the disk is gone")
    driver.submit("mix", prompt(3), adapters=MIX)
    driver.submit("other", prompt(3), adapter=3)
    driver.run()
    assert finished(driver, "mix").type == "error"
    assert finished(driver, "mix").message.endswith("cannot be brought back: the disk is gone")
    assert driver.tokens("other") == answer(prompt(3), only(3), 4, True).tokens


def test_hits_and_misses_are_counted_per_part():
    driver = Driver(few())
    driver.load(1, 2, 3)
    for rid, adapters in (("a", MIX[:2]), ("b", MIX[1:]), ("c", only(1))):
        driver.submit(rid, prompt(3), adapters=adapters)
        driver.run()
    records = [driver.tiers.store.get(version) for version in (1, 2, 3)]
    assert [(r.hits, r.misses) for r in records] == [(1, 1), (1, 1), (0, 1)]


# ---------------------------------------------------------------------- a request that cannot start


def books(driver: Driver) -> Any:
    """All that decides who is evicted, and what is counted."""
    tiers = driver.tiers
    nodes = [(n.id, [(p.pages, p.refs, p.uses, p.score) for p in n.parts]) for n in tiers.prefix._nodes.values()]
    adapter = tiers.store.get(1)
    use = adapter.refs, adapter.device and replace(adapter.device)
    counted = adapter.hits, adapter.misses, adapter.loads, adapter.evictions, adapter.fetches
    return nodes, use, counted, tiers.clock.now, list(tiers.prefix._heap)


@pytest.mark.parametrize("adapter", [None, 1])
def test_a_request_that_cannot_start_changes_nothing(adapter):
    driver = Driver(tiers(files={"/1": FakeFile()}, total_pages=16))
    driver.load(1)
    driver.submit("first", prompt(16), adapter=adapter)
    driver.run()  # its adapter is resident, its prefix is cached
    driver.submit("running", prompt(20, seed=1), max_new_tokens=20)
    driver.step(2)
    driver.submit("blocked", prompt(44), adapter=adapter)
    driver.step()
    before = books(driver)
    for _ in range(12):
        driver.engine.scheduler._admit({}, 100)
    assert books(driver) == before
    assert [r.rid for r in driver.scheduler.waiting] == ["blocked"]
    driver.run()
    assert driver.heard["blocked"][0].cached_tokens == 16
    assert driver.tokens("blocked") == answer(prompt(44), only(adapter), 4, True).tokens
