"""`LLM`: prompts in their forms, parameters and adapters per prompt, errors before anything runs, adapters at run
time, grammars and stop strings end to end.

Covers `offline.py`, `inputs.py`, `completion.py` too.
"""

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

from multilora import LLM
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine
from multilora.errors import (
    AdapterAlreadyLoaded,
    AdapterForbidden,
    AdapterNotFound,
    BadRequest,
    CannotFit,
    ConfigError,
    LoraNotEnabled,
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


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "no prompts"),
        ([TEXT, 5], "not 5"),
        ([5, "x"], r"not \[5, 'x'\]"),
        ([[5, 0.5]], "token ids"),
        (5, "not 5"),
    ],
)
def test_what_is_no_prompt(llm: LLM, prompts: Any, says: str) -> None:
    before = llm.stats()
    with pytest.raises(BadRequest, match=says):
        llm.generate(prompts)
    assert llm.stats() == before


def test_an_error_of_the_engine_ends_the_others_too(bare: Any, files: Path) -> None:
    with bare(max_total_tokens=128, page_size=16, lora_paths={}) as llm:
        expected = llm.generate(TEXT, GREEDY)
        with pytest.raises(CannotFit):
            llm.generate([TEXT, TEXT], [{"max_new_tokens": 60}, {"max_new_tokens": 200}])
        assert llm.generate(TEXT, GREEDY).token_ids == expected.token_ids
        assert llm.stats().running == llm.stats().waiting == 0


# ---------------------------------------------------------------------- adapters


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


def test_tensors_replace_a_loaded_adapter(bare: Any, files: Path, llm: LLM) -> None:
    with bare(enable_lora=True) as own:
        own.load_lora_adapter("x", str(files / "a"), weight_version="1")
        old = own.generate(TEXT, GREEDY, "x")
        with pytest.raises(AdapterAlreadyLoaded):
            own.load_lora_adapter_from_tensors("x", *tensors_of(files / "b"))
        own.load_lora_adapter_from_tensors("x", *tensors_of(files / "b"), replace=True, weight_version="2")
        new = own.generate(TEXT, GREEDY, "x")
        assert (old.weight_version, new.weight_version) == ("1", "2")
        assert old.lora_version < new.lora_version
        assert own.generate(TEXT, GREEDY).lora_version is None
        assert [one.token_ids for one in (old, new)] == [llm.generate(TEXT, GREEDY, n).token_ids for n in "ab"]
        assert len(own.stats().adapters) == 1


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
            (tensors, config | {"r": object()}, BadRequest, "config"),
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


def test_limits_without_lora(bare: Any) -> None:
    with bare() as llm, pytest.raises(LoraNotEnabled):
        llm.set_lora_limits(lora_device_bytes=None, max_loras_per_batch=2)


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
