"""What becomes of a draft: `Commits` over real pages, one request, whose sampled tokens the test says."""

import pytest
from fakes.tiers import PAGE_BYTES, FakeTiers

from multilora.engine.messages import Logprobs, Output, Submit
from multilora.engine.plan import StepPlan, StepResult
from multilora.engine.scheduling.chunks import LaunchedStep, make_chunk, make_draft_chunk
from multilora.engine.scheduling.commits import Commits
from multilora.engine.scheduling.page_namespaces import PageNamespaces
from multilora.engine.scheduling.request import Request, RequestSpec, RequestState
from multilora.memory.page_table import KVPages
from multilora.params import SamplingParams

EOS, PAGE = 2, 4
PROMPT = [5, 6, 7]


class Bench:
    """One running request with its prompt computed and one token of its answer."""

    def __init__(self, max_new_tokens: int = 20, **sampling):
        self.kv = KVPages(*self._tiers(), PAGE_BYTES)
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
        message = Submit(rid="r", input_ids=PROMPT, sampling=params)
        self.request = Request.of(RequestSpec.of(message, None, seed=0, order=0, arrival=0.0, vocab_size=99))
        self.request.namespaces = PageNamespaces.acquire(self.tiers.namespaces, (), 0, PAGE)
        self.request.state, self.request.slot, self.request.table = RequestState.RUNNING, 0, self.kv.start([])
        self.finished: list[Request] = []
        self.commits = Commits(self.kv, (EOS,), finish=self._finish, clock=lambda: 0.0, speculation=None)
        self.kv.grow(self.request.table, 3, 0)
        chunk = make_chunk(self.request, 3)
        self.request.progress.schedule(3, 1)
        self.take(chunk, [8])

    def _tiers(self):
        self.tiers = FakeTiers({}, total_pages=16, page_size=PAGE)
        return self.tiers.pool, self.tiers.prefix, self.tiers.reclaimer

    def _finish(self, request: Request) -> None:
        self.finished.append(request)
        request.state = RequestState.FINISHED

    def take(self, chunk, sampled: list[int], errors: dict[int, str] | None = None, epoch: int = 0) -> list[Output]:
        step = LaunchedStep(StepPlan(1, [chunk]), [(self.request, epoch)], 0.0)
        wrong = [(errors or {}).get(i) for i in range(len(sampled))]
        logprobs = [Logprobs(-float(token)) for token in sampled]
        return self.commits.take(step, StepResult(sampled, wrong, logprobs, [[]]), fence=1)

    def launch(self, draft: list[int]):
        """A step with a draft."""
        start = self.request.progress.num_scheduled
        assert self.kv.grow(self.request.table, start + 1 + len(draft), 0)
        chunk = make_draft_chunk(self.request, draft)
        self.request.progress.schedule_draft(len(draft))
        return chunk

    def verify(self, draft: list[int], sampled: list[int], errors: dict[int, str] | None = None) -> list[Output]:
        outputs = self.take(self.launch(draft), sampled, errors)
        progress = self.request.progress
        if self.request.state is RequestState.RUNNING:
            assert (progress.in_flight, progress.drafted) == (0, 0)
            assert progress.num_computed == progress.num_scheduled == progress.num_tokens - 1
            assert self.request.table.keyed == progress.num_computed // PAGE
            self.kv.pool.check()
            self.kv.prefix.check()
        return outputs


@pytest.mark.parametrize(
    ("sampled", "right"),
    [([9, 9, 9, 9], 0), ([10, 9, 9, 9], 1), ([10, 11, 9, 12], 2), ([10, 11, 12, 13], 3)],
)
def test_the_tokens_up_to_the_first_that_was_not_foreseen_count(sampled, right):
    bench = Bench()
    (output,) = bench.verify([10, 11, 12], sampled)
    assert output.token_ids == sampled[: right + 1]
    assert [x.logprob for x in output.logprobs] == [-token for token in output.token_ids]
    assert (output.drafted, output.accepted, output.finished) == (3, right, None)
    assert bench.request.progress.output_ids == [8, *output.token_ids]
    assert bench.commits.counts.generated == 1 + len(output.token_ids)


def test_the_cache_gets_right_tokens_only():
    bench = Bench()
    bench.verify([10, 11, 12, 13, 14], [10, 11, 12, 9, 14, 15])
    assert bench.request.tokens() == [5, 6, 7, 8, 10, 11, 12, 9]
    match = bench.kv.match([5, 6, 7, 8, 10, 11, 12, 13, 0], bench.request.namespaces.of, 8, "")
    assert len(match) == 1
    bench.verify([1, 3], [1, 4, 6])
    match = bench.kv.match([*bench.request.tokens(), 0], bench.request.namespaces.of, 9, "")
    assert len(match) == 2


def test_pages_behind_a_wrong_draft_stay_for_what_comes():
    bench = Bench()
    bench.verify([10] * 8, [9] * 9)
    pages = list(bench.request.table.pages)
    assert len(pages) == 3
    bench.verify([10] * 7, [10] * 8)
    assert bench.request.table.pages == pages


@pytest.mark.parametrize(("field", "type_"), [({}, "stop"), ({"stop_token_ids": [11]}, "stop")])
def test_an_ending_inside_a_draft_is_the_end(field, type_):
    bench = Bench(**field)
    end = 11 if field else EOS
    (output,) = bench.verify([10, end, 12], [10, end, 12, 13])
    assert output.token_ids == [10, end]
    assert (output.finished.type, output.finished.matched) == (type_, end)
    assert (output.drafted, output.accepted) == (3, 2)
    assert len(bench.finished) == 1


def test_the_length_ends_a_draft():
    bench = Bench(max_new_tokens=4, ignore_eos=True)
    (output,) = bench.verify([EOS, 10], [EOS, 10, 11])
    assert (output.token_ids, output.finished.type) == ([EOS, 10, 11], "length")


def test_an_error_behind_a_wrong_token_is_none():
    bench = Bench()
    (output,) = bench.verify([10, 11], [9, 0, 0], errors={1: "not finite", 2: "not finite"})
    assert output.token_ids == [9]


def test_an_error_at_a_right_token_ends_the_request_after_those_before():
    bench = Bench()
    before, last = bench.verify([10, 11], [10, 0, 0], errors={1: "not finite"})
    assert (before.token_ids, before.finished) == ([10], None)
    assert (last.token_ids, last.finished.type, last.finished.message) == ([], "error", "not finite")
    (only,) = Bench().verify([10], [0, 0], errors={0: "not finite"})
    assert (only.token_ids, only.finished.type) == ([], "error")


def test_a_draft_goes_with_the_pages_of_a_preempted_request():
    bench = Bench()
    chunk = bench.launch([10, 11])
    bench.kv.release(bench.request.table, 1)
    bench.request.restart()
    progress = bench.request.progress
    assert (progress.in_flight, progress.drafted, progress.num_scheduled) == (0, 0, 0)
    assert bench.take(chunk, [10, 11, 12]) == []
    assert bench.request.progress.output_ids == [8]
