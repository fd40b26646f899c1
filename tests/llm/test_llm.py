"""`LLM`: prompts in their forms, parameters and adapters per prompt, errors before anything runs, adapters at run
time, grammars and stop strings end to end."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from fakes.tokenizers import byte_level_tokenizer
from peft import LoraConfig
from safetensors.torch import load_file

from multilora import LLM, SamplingParams
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine
from multilora.errors import (
    AdapterAlreadyLoaded,
    AdapterError,
    AdapterForbidden,
    AdapterNotFound,
    AdapterNotLoaded,
    BadRequest,
    CannotFit,
    ConfigError,
    LoraNotEnabled,
    PromptTooLong,
    UnknownAdapter,
)

GREEDY = {"temperature": 0.0, "max_new_tokens": 6}
TEXT = "the cat and the dog, then the end."
EOS = 1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte-level tokenizer, and adapters a and b."""
    path = tmp_path_factory.mktemp("files")
    tokenizer = byte_level_tokenizer()
    make_tiny_model(path / "model", vocab_size=tokenizer.vocab_size + 7, bos_token_id=0, eos_token_id=EOS)
    tokenizer.hf.save_pretrained(path / "model")
    for seed, name in enumerate("ab"):
        make_adapter(path / name, path / "model", seed=seed, r=8, lora_alpha=16, target_modules="all-linear")
    return path


@pytest.fixture(scope="module")
def llm(files: Path) -> Iterator[LLM]:
    """With the real loader process; adapters a and b."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lora_paths = {"a": str(files / "a"), "b": str(files / "b")}
    with LLM(str(files / "model"), lora_paths=lora_paths, device="cpu", max_total_tokens=4096) as llm:
        yield llm
    torch.set_num_threads(threads)


@pytest.fixture
def bare(files: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an LLM that loads adapters in this process, which is quicker."""
    monkeypatch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))
    return lambda **options: LLM(str(files / "model"), **({"device": "cpu", "max_total_tokens": 2048} | options))


# ---------------------------------------------------------------------- prompts


def test_a_prompt_in_all_its_forms(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    one = llm.generate(TEXT, GREEDY)
    assert len(one.token_ids) == 6
    assert (one.finish_reason.type, one.prompt_tokens) == ("length", len(ids))
    assert one.text == llm.tokenizer.decode(one.token_ids)
    assert llm.generate(ids, GREEDY).token_ids == one.token_ids
    for batch in ([TEXT], [ids], (TEXT,)):
        [answer] = llm.generate(batch, GREEDY)
        assert answer.token_ids == one.token_ids
    mixed = llm.generate([TEXT, ids, "another"], GREEDY)
    assert [a.token_ids for a in mixed[:2]] == [one.token_ids] * 2
    assert mixed[2].token_ids == llm.generate("another", GREEDY).token_ids != one.token_ids


def test_parameters_and_adapters_per_prompt(llm: LLM) -> None:
    names = [None, "a", "b"]
    alone = [llm.generate(TEXT, GREEDY, name) for name in names]
    assert len({tuple(a.token_ids) for a in alone}) == 3
    together = llm.generate([TEXT] * 3, GREEDY, names)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.token_ids for a in llm.generate([TEXT] * 2, GREEDY, "b")] == [alone[2].token_ids] * 2
    params = [SamplingParams(temperature=0.0, max_new_tokens=2), GREEDY, None]
    lengths = [len(a.token_ids) for a in llm.generate([TEXT] * 3, params, names)]
    assert lengths[:2] == [2, 6]


def test_n_samples(llm: LLM) -> None:
    params = {"n": 3, "sampling_seed": 5, "max_new_tokens": 8}
    answers = llm.generate([TEXT, "another"], params, ["a", None])
    assert len(answers) == 6
    assert len({a.text for a in answers[:3]}) == 3
    single = llm.generate(TEXT, params, "a")
    assert [a.token_ids for a in single] == [a.token_ids for a in answers[:3]]
    second = llm.generate(TEXT, params | {"n": 1, "sampling_seed": 6}, "a")
    assert second.token_ids == answers[1].token_ids


def test_logprobs(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    answer = llm.generate(TEXT, GREEDY, "a", return_logprob=True, logprob_start_len=3, top_logprobs_num=2)
    assert len(answer.input_logprobs) == len(answer.input_top_logprobs) == len(ids) - 3
    for logprob, token, top in zip(answer.logprobs, answer.token_ids, answer.top_logprobs, strict=True):
        assert top[0] == (logprob, token)
        assert top[1][0] <= logprob <= 0
    plain = llm.generate(TEXT, GREEDY, "a")
    assert plain.logprobs is plain.input_logprobs is plain.top_logprobs is None
    assert plain.cached_tokens == (len(ids) - 1) // 16 * 16


# ---------------------------------------------------------------------- stops and grammars


def test_a_stop_string_cuts_text_and_tokens(llm: LLM) -> None:
    whole = llm.generate(TEXT, GREEDY | {"max_new_tokens": 20, "ignore_eos": True, "logit_bias": {"70": 4.0}})
    stop = llm.tokenizer.decode([70])
    assert stop in whole.text
    answer = llm.generate(
        TEXT, GREEDY | {"max_new_tokens": 20, "ignore_eos": True, "logit_bias": {"70": 4.0}, "stop": stop}
    )
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(70) + 1]
    assert (answer.finish_reason.type, answer.finish_reason.matched) == ("stop", stop)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


def test_grammars(llm: LLM) -> None:
    """In one batch, greedy and random, over base and adapters, beside a free answer."""
    by_schema = {"json_schema": json.dumps(SCHEMA), "max_new_tokens": 60}
    by_regex = {"regex": "[0-9]{3}-(yes|no)", "max_new_tokens": 60, "temperature": 2.0, "sampling_seed": 3}
    by_ebnf = {"ebnf": 'root ::= "<" [a-c]+ ">"', "max_new_tokens": 60, "temperature": 0.8, "sampling_seed": 3}
    params = [by_schema | {"temperature": 0.0}, by_schema | {"sampling_seed": 1}, by_regex, by_ebnf, GREEDY]
    names = [None, "a", "b", "a", "b"]
    answers = llm.generate([TEXT] * 5, params, names)
    for answer in answers[:2]:
        found = json.loads(answer.text)
        assert set(found) == {"name", "legs"} and found["name"] in ("cat", "dog")
    assert re.fullmatch("[0-9]{3}-(yes|no)", answers[2].text)
    assert re.fullmatch("<[a-c]+>?", answers[3].text)
    assert all((a.finish_reason.type, a.finish_reason.matched) == ("stop", EOS) for a in answers[:3])
    assert answers[4].token_ids == llm.generate(TEXT, GREEDY, "b").token_ids
    for i, (params_of, name) in enumerate(zip(params, names, strict=True)):
        assert llm.generate(TEXT, params_of, name).token_ids == answers[i].token_ids


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "params", "lora_path", "error", "says"),
    [
        ([], None, None, BadRequest, "no prompts"),
        ("", {"max_new_tokens": -1}, None, BadRequest, "max_new_tokens"),
        ([TEXT, []], None, None, BadRequest, "empty"),
        ([TEXT, 5], None, None, BadRequest, "not 5"),
        ([5, "x"], None, None, BadRequest, "not 5"),
        ([[5, 0.5]], None, None, BadRequest, "token ids"),
        ([TEXT, [5, 9999]], None, None, BadRequest, "9999"),
        ([TEXT, [5] * 256], None, None, PromptTooLong, "256"),
        ([TEXT, TEXT], {"temperature": "hot"}, None, BadRequest, "temperature"),
        ([TEXT, TEXT], [GREEDY], None, BadRequest, "1 entries for 2 inputs"),
        ([TEXT, TEXT], None, ["a"], BadRequest, "1 entries for 2 inputs"),
        ([TEXT, TEXT], None, ["a", "nobody"], UnknownAdapter, "nobody"),
        ([TEXT, TEXT], [GREEDY, {"regex": "("}], "a", BadRequest, "regex"),
        ([TEXT, TEXT], [GREEDY, {"stop_token_ids": [5000]}], "a", BadRequest, "5000"),
    ],
)
def test_errors_come_before_anything_runs(
    llm: LLM, prompts: Any, params: Any, lora_path: Any, error: type[BadRequest], says: str
) -> None:
    before = llm.stats()
    with pytest.raises(error, match=says):
        llm.generate(prompts, params, lora_path)
    with pytest.raises(BadRequest, match="top_logprobs_num"):
        llm.generate(TEXT, return_logprob=True, top_logprobs_num=-1)
    assert llm.stats() == before
    assert llm.generate(TEXT, GREEDY, "a").finish_reason.type == "length"


def test_an_error_of_the_engine_ends_the_others_too(bare: Any, files: Path) -> None:
    with bare(max_total_tokens=128, page_size=16, lora_paths={}) as llm:
        expected = llm.generate(TEXT, GREEDY)
        with pytest.raises(CannotFit):
            llm.generate([TEXT, TEXT], [{"max_new_tokens": 60}, {"max_new_tokens": 200}])
        assert llm.generate(TEXT, GREEDY).token_ids == expected.token_ids
        assert llm.stats().running == llm.stats().waiting == 0


# ---------------------------------------------------------------------- adapters


def test_load_and_unload_at_run_time(bare: Any, files: Path, tmp_path: Path) -> None:
    with bare(enable_lora=True) as llm:
        with pytest.raises(UnknownAdapter):
            llm.generate(TEXT, GREEDY, "x")
        info = llm.load_lora_adapter("x", str(files / "a"))
        assert (info.rank, info.path) == (8, str(files / "a"))
        assert llm.loaded_adapters() == {"x": str(files / "a")}
        first = llm.generate(TEXT, GREEDY, "x")
        with pytest.raises(AdapterAlreadyLoaded):
            llm.load_lora_adapter("x", str(files / "b"))
        with pytest.raises(AdapterNotFound):
            llm.load_lora_adapter("y", str(tmp_path / "nowhere"))
        assert llm.loaded_adapters() == {"x": str(files / "a")}
        assert llm.generate(TEXT, GREEDY, "x").token_ids == first.token_ids
        llm.unload_lora_adapter("x")
        assert llm.loaded_adapters() == {}
        assert llm.stats().adapter_pages == 0
        with pytest.raises(UnknownAdapter):
            llm.generate(TEXT, GREEDY, "x")
        with pytest.raises(AdapterNotLoaded):
            llm.unload_lora_adapter("x")
        llm.load_lora_adapter("x", str(files / "b"))
        assert llm.generate(TEXT, GREEDY, "x").token_ids != first.token_ids


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter at `path` as it would be in memory: PEFT's tensors and PEFT's config."""
    config = LoraConfig.from_pretrained(path).to_dict()
    return load_file(path / "adapter_model.safetensors"), config


def test_adapters_from_tensors(bare: Any, files: Path, llm: LLM, tmp_path: Path) -> None:
    """Inside --lora-root or not, evicted from host memory and back, gone with the unload."""
    expected = {name: llm.generate(TEXT, GREEDY, name).token_ids for name in "ab"}
    with bare(enable_lora=True, max_loaded_loras=1, lora_root=str(tmp_path)) as small:
        for name in "ab":
            info = small.load_lora_adapter_from_tensors(name, *tensors_of(files / name))
            assert info.rank == 8
        folder = Path(info.path).parent
        assert small.loaded_adapters() == {"a": "__tensor__", "b": "__tensor__"}
        for name in "abab":
            assert small.generate(TEXT, GREEDY, name).token_ids == expected[name]
        assert sum(adapter.fetches for adapter in small.stats().adapters) > 2, "nothing was ever evicted"
        with pytest.raises(AdapterForbidden):
            small.load_lora_adapter("c", str(files / "a"))
        small.unload_lora_adapter("a")
        assert [path.name for path in folder.iterdir()] == ["2"]
        assert small.generate(TEXT, GREEDY, "b").token_ids == expected["b"]
    assert not folder.exists()


def test_views_and_other_layouts_are_copied(bare: Any, files: Path, llm: LLM) -> None:
    tensors, config = tensors_of(files / "a")
    strided = {name: tensor.T.contiguous().T.requires_grad_() for name, tensor in tensors.items()}
    with bare(enable_lora=True) as own:
        own.load_lora_adapter_from_tensors("a", strided, config)
        for tensor in strided.values():
            tensor.data.zero_()
        assert own.generate(TEXT, GREEDY, "a").token_ids == llm.generate(TEXT, GREEDY, "a").token_ids


def test_bad_tensors(bare: Any, files: Path) -> None:
    tensors, config = tensors_of(files / "a")
    some = next(iter(tensors))
    with bare(enable_lora=True) as llm:
        cases: list[tuple[Any, Any, type[Exception], str]] = [
            (tensors | {some: [1.0]}, config, BadRequest, "tensors"),
            (tensors | {some: tensors[some].to("meta")}, config, BadRequest, "tensors"),
            (tensors | {some: tensors[some].to_sparse()}, config, BadRequest, "tensors"),
            (list(tensors), config, BadRequest, "tensors"),
            (tensors | {some: tensors[some].int()}, config, AdapterError, "dtype"),
            (tensors | {some: tensors[some] * torch.nan}, config, AdapterError, "finite|NaN"),
            (tensors | {"x": tensors[some]}, config, AdapterError, "left over"),
            (tensors, config | {"r": 3}, AdapterError, "rank"),
            (tensors, config | {"r": object()}, BadRequest, "config"),
            (tensors, {}, AdapterError, "peft_type"),
        ]
        for wrong, settings, error, said in cases:
            with pytest.raises(error, match=said):
                llm.load_lora_adapter_from_tensors("a", wrong, settings)
        assert llm.loaded_adapters() == {}
        assert list(llm._spool.root.iterdir()) == []
        llm.load_lora_adapter_from_tensors("a", tensors, config)


def test_several_adapters_at_once(bare: Any, files: Path, llm: LLM, tmp_path: Path) -> None:
    with bare(enable_lora=True) as own:
        own.load_lora_adapters({"a": str(files / "a"), "b": str(files / "b")})
        assert own.loaded_adapters() == {"a": str(files / "a"), "b": str(files / "b")}
        for name in "ab":
            assert own.generate(TEXT, GREEDY, name).token_ids == llm.generate(TEXT, GREEDY, name).token_ids
        paths = {"c": str(files / "a"), "a": str(files / "a"), "d": str(tmp_path / "nowhere"), "e": str(files / "b")}
        with pytest.raises(AdapterAlreadyLoaded):
            own.load_lora_adapters(paths)
        with pytest.raises(AdapterNotFound):
            own.load_lora_adapters({"d": str(tmp_path / "nowhere")})
        assert list(own.loaded_adapters()) == ["a", "b", "c", "e"], "the others came"


def test_limits_change_at_run_time(bare: Any, files: Path) -> None:
    with bare(lora_paths={"a": str(files / "a"), "b": str(files / "b")}) as llm:
        expected = [llm.generate(TEXT, GREEDY, name).token_ids for name in "ab"]
        assert llm.stats().slots_used == 2
        llm.set_lora_limits(lora_device_bytes=None, max_loras_per_batch=1)
        assert llm.stats().slots_used == llm.stats().slots_total == 1
        assert [a.token_ids for a in llm.generate([TEXT] * 2, GREEDY, ["a", "b"])] == expected
        assert llm.stats().slots_used == 1
        with pytest.raises(ConfigError, match="--lora-device-bytes"):
            llm.set_lora_limits(lora_device_bytes=1, max_loras_per_batch=None)
        llm.set_lora_limits(lora_device_bytes=None, max_loras_per_batch=None)
        assert [a.token_ids for a in llm.generate([TEXT] * 2, GREEDY, ["a", "b"])] == expected
        assert llm.stats().slots_used == 2


def test_more_adapters_than_fit_a_batch(bare: Any, files: Path, llm: LLM) -> None:
    """Served in rounds, the same answers."""
    names = ["a", "b", None, "c", "a", "b"]
    paths = [f"a={files / 'a'}", {"lora_name": "b", "lora_path": str(files / "b")}, f"c={files / 'a'}"]
    with bare(lora_paths=paths, max_loras_per_batch=1, max_loaded_loras=3) as small:
        answers = small.generate([TEXT] * 6, GREEDY, names)
    expected = llm.generate([TEXT] * 6, GREEDY, [n and n.replace("c", "a") for n in names])
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]


def test_without_lora(bare: Any, files: Path) -> None:
    with bare() as llm:
        with pytest.raises(LoraNotEnabled):
            llm.generate(TEXT, GREEDY, "a")
        with pytest.raises(LoraNotEnabled):
            llm.load_lora_adapter("a", str(files / "a"))
        with pytest.raises(LoraNotEnabled):
            llm.set_lora_limits(lora_device_bytes=None, max_loras_per_batch=2)
        assert llm.generate(TEXT, GREEDY).finish_reason.type == "length"


def test_without_tokenizer(bare: Any) -> None:
    with bare(skip_tokenizer_init=True) as llm:
        answer = llm.generate([5, 6, 7], GREEDY)
        assert (len(answer.token_ids), answer.text) == (6, "")
        for prompt, params in ((TEXT, None), ([5, 6], {"stop": "x"}), ([5, 6], {"regex": "x"})):
            with pytest.raises(BadRequest, match="tokenizer"):
                llm.generate(prompt, params)


# ---------------------------------------------------------------------- start and end


def test_a_bad_start_leaves_nothing_behind(bare: Any, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(InlineLoader, "close", lambda loader: closed.append(loader))
    with pytest.raises(AdapterNotFound):
        bare(lora_paths={"a": str(files / "a"), "x": str(files / "nowhere")})
    assert len(closed) == 1
    with pytest.raises(ConfigError, match="max_loras_per_batch"):
        bare(max_lora_per_batch=1)
    with pytest.raises(ConfigError):
        bare(tokenizer_path=str(files / "a"))
    with bare(enable_lora=True):
        pass
    assert len(closed) == 2


def test_compositions(llm: LLM) -> None:
    mix = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": -1}]

    def text(lora_path: Any) -> str:
        return llm.generate(TEXT, GREEDY, lora_path).text

    assert len({text(choice) for choice in (None, "a", "b", mix, [mix[0]])}) == 5
    assert text(mix[::-1]) == text(mix)
    answers = llm.generate([TEXT] * 3, GREEDY, [mix, "a", None])
    assert [answer.text for answer in answers] == [text(mix), text("a"), text(None)]
    llm.compose_lora_adapters("mix", mix)
    assert llm.loaded_adapters()["mix"] == "0.5 * a + -1 * b"
    assert text("mix") == text(mix)
    with pytest.raises(AdapterError, match="part of composition 'mix'"):
        llm.unload_lora_adapter("a")
    llm.unload_lora_adapter("mix")
    with pytest.raises(UnknownAdapter):
        text("mix")
    with pytest.raises(UnknownAdapter, match="'nope'"):
        text([{"name": "a"}, {"name": "nope", "weight": 0}])
