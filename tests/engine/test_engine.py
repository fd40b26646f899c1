"""The engine as its front sees it: checks at the door, endings, calls, and who waits for whom.

Covers `messages.py` too.
"""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xgrammar
from fakes.engine_driver import Answer, EngineDriver
from fakes.models import make_adapter, make_tiny_model
from safetensors.torch import load_file, save_file

from multilora.engine.messages import FlushCache, Outputs, Submit, UnloadAdapter, UseTokenizer
from multilora.engine.scheduling.scheduler import Scheduler
from multilora.engine.stats import StatsReporter
from multilora.errors import AdapterIncompatible, AdapterInvalid, AdapterNotFound, AdapterNotLoaded
from multilora.params import SamplingParams

PROMPT = [5, 17, 80, 33, 9, 61, 44, 3, 12, 90, 71, 28, 50, 6, 99, 41, 18, 77, 23, 65]
EOS = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, and adapters a, b, c."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("files")
    make_tiny_model(path / "model")
    for seed, name in enumerate("abc"):
        make_adapter(path / name, path / "model", seed=seed, r=8, lora_alpha=16, target_modules="all-linear")
    yield path
    torch.set_num_threads(threads)


def drive(files: Path, names: str = "", **options: Any) -> EngineDriver:
    return EngineDriver(files / "model", {name: files / name for name in names}, **options)


def error_of(answer: Answer) -> str:
    assert answer.tokens == []
    assert answer.finished is not None
    assert answer.finished.type == "error"
    return answer.finished.kind


# ---------------------------------------------------------------------- the door


def test_what_could_never_fit_is_refused(files: Path) -> None:
    driver = drive(files, "a", page_size=4, max_total_tokens=40 * 4)
    pages = driver.infos["a"].pages
    assert driver.complete(PROMPT, max_new_tokens=40 * 4 - 20).finished.type == "length"
    assert error_of(driver.complete(PROMPT, max_new_tokens=40 * 4 - 19)) == "CannotFit"
    room = (40 - pages) * 4 - 20
    assert driver.complete(PROMPT, "a", max_new_tokens=room, ignore_eos=True).finished.type == "length"
    refused = driver.complete(PROMPT, "a", max_new_tokens=room + 1)
    assert error_of(refused) == "CannotFit"
    assert "need 41 pages of 4 tokens; 40 of 40" in refused.finished.message
    assert driver.complete(PROMPT).finished.type == "length"


def test_pinned_adapters_take_room_from_everybody(files: Path) -> None:
    pages = drive(files, "a", page_size=4).infos["a"].pages
    driver = drive(files, "b", page_size=4, max_total_tokens=(2 * pages + 80) * 4, context_length=128)
    driver.load("a", files / "a", pinned=True)
    room = (pages + 80) * 4 - len(PROMPT)
    assert error_of(driver.complete(PROMPT, max_new_tokens=room + 1)) == "CannotFit"
    assert error_of(driver.complete(PROMPT, "b", max_new_tokens=room - 4 * pages + 1)) == "CannotFit"
    assert error_of(driver.complete(PROMPT, "a", max_new_tokens=room + 1)) == "CannotFit"
    for name in ("a", "b", None):
        assert driver.complete(PROMPT, name).finished.type in ("stop", "length")
    assert driver.stats.adapter_pages == 2 * pages


def test_a_full_queue_refuses(files: Path) -> None:
    driver = drive(files, max_queued_requests=2, max_running_requests=1)
    running = driver.submit(PROMPT)
    driver.step()
    rids = [driver.submit(PROMPT) for _ in range(3)]
    driver.run()
    assert error_of(driver.answers[rids[2]]) == "QueueFull"
    assert {driver.answers[rid].finished.type for rid in [running, *rids[:2]]} == {"length"}


def test_a_request_id_in_use_is_refused(files: Path) -> None:
    driver = drive(files)
    expected = driver.complete(PROMPT).tokens
    rid = driver.submit(PROMPT)
    driver.step()
    driver.engine.handle(Submit(rid=rid, input_ids=[5], sampling=SamplingParams(max_new_tokens=3)))
    going_on, refused = [m.items[0] for m in driver.engine.step() if isinstance(m, Outputs)]
    assert refused.finished is not None and refused.finished.kind == "BadRequest"
    assert going_on.token_ids == expected[1:2]
    driver.answers[rid].add(going_on)
    driver.run()
    assert driver.answers[rid].tokens == expected


@pytest.mark.parametrize("enable_lora", [False, True])
def test_an_unknown_version_is_never_served_by_base(files: Path, enable_lora: bool) -> None:
    driver = drive(files, enable_lora=enable_lora)
    driver.answers["x"] = Answer()
    driver.engine.handle(Submit(rid="x", input_ids=PROMPT, sampling=SamplingParams(), adapters=((7, 1.0),)))
    driver.run()
    assert error_of(driver.answers["x"]) == "UnknownAdapter"


def test_a_grammar_needs_a_tokenizer(files: Path) -> None:
    assert error_of(drive(files).complete(PROMPT, grammar="{}")) == "BadRequest"


# ---------------------------------------------------------------------- grammars

INFO = xgrammar.TokenizerInfo([bytes([i]) for i in range(99)], vocab_size=101, stop_token_ids=[EOS])


def grammar(regex: str) -> str:
    return xgrammar.Grammar.from_regex(regex).serialize_json()


class SlowCompiler:
    """Compiles nothing before it `may`."""

    def __init__(self, compiler: xgrammar.GrammarCompiler):
        self.may = threading.Event()
        self._compiler = compiler

    def compile_grammar(self, grammar: xgrammar.Grammar) -> xgrammar.CompiledGrammar:
        assert self.may.wait(60)
        return self._compiler.compile_grammar(grammar)


def slow_compiler(driver: EngineDriver) -> SlowCompiler:
    driver.engine.handle(UseTokenizer(INFO.serialize_json()))
    cache = driver.engine.runner._sampler._grammars
    cache._compiler = SlowCompiler(cache._compiler)
    return cache._compiler


def test_a_grammar_that_is_being_compiled_holds_up_nobody(files: Path) -> None:
    driver = drive(files)
    compiler = slow_compiler(driver)
    first, second = (driver.submit(PROMPT, grammar=grammar("[0-9]{3}")) for _ in range(2))
    other = driver.submit(PROMPT)
    driver.step(30)
    assert driver.answers[other].finished.type == "length"
    assert driver.engine.busy and not driver.engine.running
    driver.abort(second)
    driver.step()
    assert driver.answers[second].finished.type == "abort"
    compiler.may.set()
    driver.run()
    assert bytes(driver.answers[first].tokens[:3]).isdigit()


def under_grammars(files: Path, ahead: int, **options: Any) -> dict[str, Answer]:
    """Grammars that end soon and late, with and without penalties, among requests that have none."""
    driver = drive(files, "a", ahead=ahead, **options)
    driver.engine.handle(UseTokenizer(INFO.serialize_json()))
    kinds: list[dict[str, Any]] = [
        {"grammar": grammar("[0-9]{3}")},
        {"grammar": grammar("[0-9A-Z]{1,20}"), "repetition_penalty": 1.5},
        {"grammar": grammar("(ab|AB)*"), "min_new_tokens": 5, "max_new_tokens": 9},
        {"grammar": grammar("[0-9]+"), "temperature": 0.9, "sampling_seed": 5},
        {"repetition_penalty": 1.3},
        {},
    ]
    for i, kind in enumerate(kinds * 2):
        driver.submit(PROMPT[i % 3 :], "a" if i % 2 else None, **kind)
        driver.step()
    driver.run()
    driver.close()
    return driver.answers


@pytest.mark.parametrize("options", [{}, {"page_size": 4, "max_total_tokens": 300, "chunked_prefill_size": 7}])
def test_grammars_one_step_ahead_give_what_they_give_in_turn(files: Path, options: dict[str, Any]) -> None:
    in_turn, ahead = (under_grammars(files, ahead, **options) for ahead in (0, 1))
    assert {rid: a.tokens for rid, a in in_turn.items()} == {rid: a.tokens for rid, a in ahead.items()}
    assert {a.finished.type for a in ahead.values()} == {"stop", "length"}
    text = bytes(ahead["0"].tokens[:-1]).decode()
    assert text.isdecimal() and len(text) == 3 and ahead["0"].tokens[-1] == EOS


# ---------------------------------------------------------------------- endings


def test_max_new_tokens_0_reads_the_prompt_only(files: Path) -> None:
    driver = drive(files, page_size=4)
    options = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    expected = driver.complete(PROMPT, max_new_tokens=1, **options)
    driver.call(FlushCache(100))
    for chunks in range(2):
        answer = driver.complete(PROMPT, max_new_tokens=0, **options)
        assert (answer.tokens, answer.logprobs, answer.finished.type) == ([], [], "length")
        assert answer.input_logprobs[0] is None
        assert answer.input_logprobs[1:] == pytest.approx(expected.input_logprobs[1:], abs=1e-5)
        assert len(answer.input_top_logprobs) == len(PROMPT), chunks
    assert driver.complete(PROMPT, max_new_tokens=0).cached_tokens == 16
    assert driver.complete(PROMPT).cached_tokens == 16


def test_stop_tokens(files: Path) -> None:
    driver = drive(files)
    tokens = driver.complete(PROMPT, ignore_eos=True).tokens
    assert len(tokens) == 12
    stop = tokens[4]
    answer = driver.complete(PROMPT, ignore_eos=True, stop_token_ids=[stop, 100])
    assert answer.tokens == tokens[: tokens.index(stop) + 1]
    assert (answer.finished.type, answer.finished.matched) == ("stop", stop)
    later = driver.complete(PROMPT, stop_token_ids=[stop], min_new_tokens=8)
    assert stop not in later.tokens[:8]
    assert len(later.tokens) > 8


def test_eos_and_ignore_eos(files: Path) -> None:
    driver = drive(files)
    want_eos = {"logit_bias": {str(EOS): 1000.0}}
    answer = driver.complete(PROMPT, **want_eos)
    assert (answer.tokens, answer.finished.type, answer.finished.matched) == ([EOS], "stop", EOS)
    assert driver.complete(PROMPT, **want_eos, ignore_eos=True, max_new_tokens=5).tokens == [EOS] * 5
    held_back = driver.complete(PROMPT, **want_eos, min_new_tokens=4)
    assert held_back.tokens == [*driver.complete(PROMPT, min_new_tokens=4).tokens[:4], EOS]


def test_abort(files: Path) -> None:
    """Running, waiting, before the first step, twice, after the end, and never heard of."""
    driver = drive(files, "a", max_running_requests=2)
    tokens = driver.complete(PROMPT).tokens
    staying, running = driver.submit(PROMPT), driver.submit(PROMPT, "a")
    waiting, fresh = driver.submit(PROMPT, "a"), driver.submit(PROMPT)
    driver.step()
    driver.step()
    for rid in (running, waiting, fresh, running, "nobody"):
        driver.abort(rid)
    driver.run()
    driver.abort(staying)
    driver.run()
    assert [driver.answers[rid].finished.type for rid in (running, waiting, fresh)] == ["abort"] * 3
    assert len(driver.answers[running].tokens) == 2
    assert driver.answers[waiting].tokens == driver.answers[fresh].tokens == []
    assert driver.answers[staying].tokens == tokens


def test_finish_is_silent(files: Path) -> None:
    driver = drive(files, "a")
    rid, other = driver.submit(PROMPT, "a"), driver.submit(PROMPT)
    driver.step()
    driver.finish(rid)
    driver.finish("nobody")
    driver.run()
    assert driver.answers[rid].finished is None
    assert len(driver.answers[rid].tokens) == 1
    assert driver.answers[other].finished.type == "length"


def test_an_adapter_that_overflows_harms_nobody_else(files: Path, tmp_path: Path) -> None:
    """Its own request ends with an error; NaN that it left in pages does not reach those who get them next."""
    shutil.copytree(files / "a", tmp_path / "huge")
    weights = load_file(tmp_path / "huge" / "adapter_model.safetensors")
    save_file({k: v * 1e30 for k, v in weights.items()}, tmp_path / "huge" / "adapter_model.safetensors")
    driver = drive(files, "b", page_size=4, max_total_tokens=4 * 64, disable_radix_cache=True)
    expected = {name: driver.complete(PROMPT, name).tokens for name in (None, "b")}
    driver.load("huge", tmp_path / "huge")
    for _ in range(3):
        rids = {name: driver.submit(PROMPT, name) for name in (None, "b")}
        bad = driver.submit(PROMPT, "huge")
        driver.run()
        assert error_of(driver.answers[bad]) == "AdapterInvalid"
        assert "not finite" in driver.answers[bad].finished.message
        assert {name: driver.answers[rid].tokens for name, rid in rids.items()} == expected


# ---------------------------------------------------------------------- calls


def test_flush_cache(files: Path) -> None:
    driver = drive(files, "a", page_size=4)
    for name in (None, "a"):
        driver.complete(PROMPT, name)
    running = driver.submit(PROMPT)
    driver.step()
    driver.call(FlushCache(100))
    driver.run()
    assert driver.answers[running].cached_tokens == 16
    assert driver.complete(PROMPT, "a").cached_tokens == 0


def test_unload_frees_and_a_new_version_shares_nothing(files: Path) -> None:
    driver = drive(files, "a", page_size=4)
    first = driver.complete(PROMPT, "a")
    version = driver.infos["a"].version
    driver.unload("a")
    stats = driver.stats
    assert (stats.adapter_pages, stats.prefix_pages, stats.free_pages) == (0, 0, stats.total_pages)
    with pytest.raises(AdapterNotLoaded):
        driver.call(UnloadAdapter(50, version))
    driver.load("a", files / "b")
    other = driver.complete(PROMPT, "a")
    assert other.cached_tokens == 0
    assert other.tokens == drive(files, "b").complete(PROMPT, "b").tokens != first.tokens


def test_a_failed_load_changes_nothing(files: Path, tmp_path: Path) -> None:
    driver = drive(files, "a")
    before = driver.stats
    with pytest.raises(AdapterNotFound):
        driver.load("x", tmp_path / "nowhere")
    shutil.copytree(files / "b", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterInvalid):
        driver.load("x", tmp_path / "cut")
    assert driver.stats == before
    assert driver.complete(PROMPT, "a").finished.type in ("stop", "length")


def test_an_adapter_larger_than_the_arena(files: Path) -> None:
    driver = drive(files, max_total_tokens=64)
    with pytest.raises(AdapterIncompatible, match="the smallest of the arena"):
        driver.load("a", files / "a")
    assert driver.complete(PROMPT).finished.type == "length"


def test_an_adapter_that_cannot_come_back(files: Path, tmp_path: Path) -> None:
    """Evicted everywhere, then its files are gone: who waits gets the error, others go on, and it may return."""
    shutil.copytree(files / "a", tmp_path / "a")
    driver = drive(files, max_loras_per_batch=1, max_loaded_loras=1)
    driver.load("a", tmp_path / "a")
    expected = driver.complete(PROMPT, "a").tokens
    driver.load("b", files / "b")
    driver.complete(PROMPT, "b")
    (tmp_path / "a").rename(tmp_path / "away")
    rids = [driver.submit(PROMPT, name) for name in ("a", "b", "a", None)]
    driver.run()
    kinds = [driver.answers[rid].finished.kind for rid in rids]
    assert kinds == ["AdapterUnavailable", "", "AdapterUnavailable", ""]
    (tmp_path / "away").rename(tmp_path / "a")
    assert driver.complete(PROMPT, "a").tokens == expected


# ---------------------------------------------------------------------- fairness


def passed_by(files: Path, max_wait: float, steps: int) -> int:
    """How many younger requests go before one that is blocked.

    There is room for one adapter; a request on b waits while every step, which takes a second, brings one more on a.
    """
    driver = drive(files, "ab", max_loras_per_batch=1)
    engine, late = driver.engine, 0.0
    engine.scheduler = Scheduler(
        engine.scheduler.kv,
        engine.adapters,
        engine.scheduler.namespaces,
        engine.scheduler._journal,
        eos_token_ids=(EOS,),
        max_running=64,
        chunk_tokens=2048,
        max_wait=max_wait,
        clock=lambda: late,
    )
    engine.report = StatsReporter(engine.scheduler, engine.adapters)
    driver.submit(PROMPT, "a", ignore_eos=True)
    driver.step()
    blocked = driver.submit(PROMPT, "b")
    younger = []
    while not driver.answers[blocked].tokens and late < steps:
        younger.append(driver.submit(PROMPT, "a", ignore_eos=True))
        driver.step()
        late += 1.0
    passed = sum(bool(driver.answers[rid].tokens) for rid in younger)
    driver.run()
    return passed


def test_younger_requests_pass_one_that_is_blocked(files: Path) -> None:
    assert passed_by(files, max_wait=1e9, steps=40) == 40


def test_nobody_passes_one_that_has_waited_too_long(files: Path) -> None:
    assert passed_by(files, max_wait=4.5, steps=40) == 5
