"""`LLM` with adapters that have tokens of their own, against transformers and PEFT: text in, text out, one batch."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from fakes.tokenizers import byte_level_tokenizer, with_added_tokens
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from multilora import LLM
from multilora.errors import AdapterInvalid, BadRequest

BASE = byte_level_tokenizer()
OWN = with_added_tokens(BASE, "<|call|>", eos="<|end|>")
ROWS, OWN_ROWS = BASE.vocab_size + 1, BASE.vocab_size + 5
CALL, END = BASE.vocab_size, BASE.vocab_size + 1
TEXT = "the cat<|call|>and the dog"
GREEDY = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True, "skip_special_tokens": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a plain adapter, one with more rows and a tokenizer, the same without, one in rows that were there."""
    path = tmp_path_factory.mktemp("files")
    make_tiny_model(path / "model", vocab_size=ROWS, bos_token_id=0, eos_token_id=1)
    BASE.hf.save_pretrained(path / "model")
    config = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    make_adapter(path / "plain", path / "model", seed=1, **config)
    both = {"modules_to_save": ["embed_tokens", "lm_head"]}
    prepare = {"prepare": lambda model: model.resize_token_embeddings(OWN_ROWS, mean_resizing=False)}
    make_adapter(path / "own", path / "model", seed=2, **prepare, **(config | both))
    shutil.copytree(path / "own", path / "bare")
    OWN.hf.save_pretrained(path / "own")
    make_adapter(path / "spare", path / "model", seed=3, **(config | {"trainable_token_indices": [CALL]}))
    with_added_tokens(BASE, "<|call|>").hf.save_pretrained(path / "spare")
    return path


@pytest.fixture(scope="module")
def llm(files: Path) -> Iterator[LLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    paths = {name: str(files / name) for name in ("plain", "own", "bare", "spare")}
    with LLM(
        str(files / "model"), lora_paths=paths, device="cpu", max_total_tokens=4096, max_logprobs=OWN_ROWS
    ) as llm:
        yield llm
    torch.set_num_threads(threads)


def expected(files: Path, name: str, rows: int) -> tuple[list[int], str]:
    """As PEFT's users do it: the tokenizer from the adapter's directory, the base model resized."""
    tokenizer = AutoTokenizer.from_pretrained(files / name)
    model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rows != ROWS:
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, str(files / name)).eval()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert CALL in ids
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "eos_token_id": None}
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    return answer.tolist(), tokenizer.decode(answer)


def test_text_as_transformers_and_peft(llm: LLM, files: Path) -> None:
    names = ["own", None, "spare", "plain", "own"]
    answers = llm.generate([TEXT] * 5, GREEDY, names)
    alone = [llm.generate(TEXT, GREEDY, name) for name in names]
    for answer, other in zip(answers, alone, strict=True):
        assert (answer.token_ids, answer.text) == (other.token_ids, other.text)
    for name, answer, rows in (("own", answers[0], OWN_ROWS), ("spare", answers[2], ROWS)):
        assert (answer.token_ids, answer.text) == expected(files, name, rows)
        assert answer.prompt_tokens == len(OWN.encode(TEXT))
    assert answers[1].prompt_tokens == answers[3].prompt_tokens == len(BASE.encode(TEXT))


def test_its_end_ends_it(llm: LLM) -> None:
    params = {"temperature": 0.0, "max_new_tokens": 4, "logit_bias": {str(END): 1e6}}
    answer = llm.generate("the", params, "own")
    assert (answer.token_ids, answer.text, answer.finish_reason.matched) == ([END], "", END)
    with pytest.raises(BadRequest, match=f"logit_bias: token id {END} is outside the vocabulary of {ROWS} tokens"):
        llm.generate("the", params, "plain")


def test_the_whole_vocabulary_has_logprobs(llm: LLM) -> None:
    for name, rows in (("bare", OWN_ROWS), (None, ROWS)):
        answer = llm.generate([5], GREEDY, name, return_logprob=True, top_logprobs_num=rows)
        assert answer.top_logprobs is not None
        found = {token for _, token in answer.top_logprobs[0]}
        assert found == set(range(rows))


def test_refusals(llm: LLM, files: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="came without a tokenizer: send input_ids"):
        llm.generate(TEXT, GREEDY, "bare")
    with pytest.raises(BadRequest, match="an adapter with tokens of its own"):
        llm.generate(TEXT, GREEDY | {"regex": "a+"}, "own")
    with pytest.raises(BadRequest, match=rf"token id {ROWS} is outside"):
        llm.generate([[ROWS], [ROWS]], GREEDY, ["own", "plain"])
    shutil.copytree(files / "own", tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    before = (llm.loaded_adapters(), len(llm.stats().adapters))
    for load in (llm.load_lora_adapter, lambda name, path: llm.load_lora_adapters({name: path})):
        with pytest.raises(AdapterInvalid, match="the tokenizer of the adapter cannot be loaded"):
            load("broken", str(tmp_path / "broken"))
        assert (llm.loaded_adapters(), len(llm.stats().adapters)) == before


def test_from_tensors_and_several_at_once(llm: LLM, files: Path) -> None:
    """Tensors bring no tokenizer; after an unload the name is as free as any."""
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    config |= {"modules_to_save": ["embed_tokens", "lm_head"]}
    llm.load_lora_adapter_from_tensors("more", load_file(files / "own" / "adapter_model.safetensors"), config)
    by_ids = llm.generate(OWN.encode(TEXT), GREEDY, "more")
    assert by_ids.token_ids == llm.generate(TEXT, GREEDY, "own").token_ids
    with pytest.raises(BadRequest, match="came without a tokenizer"):
        llm.generate(TEXT, GREEDY, "more")
    llm.unload_lora_adapter("more")
    llm.load_lora_adapters({"more": str(files / "own"), "less": str(files / "plain")})
    assert llm.generate(TEXT, GREEDY, "more").token_ids == by_ids.token_ids
    for name in ("more", "less"):
        llm.unload_lora_adapter(name)


def test_whatever_fails_after_the_load_undoes_it(llm: LLM, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(info: object, path: str | None) -> None:
        raise KeyboardInterrupt

    before = [adapter.version for adapter in llm.stats().adapters]
    with monkeypatch.context() as patch:
        patch.setattr(llm._front.vocabularies, "add", add)
        with pytest.raises(KeyboardInterrupt):
            llm.load_lora_adapter("late", str(files / "own"))
    assert [adapter.version for adapter in llm.stats().adapters] == before
    assert "late" not in llm.loaded_adapters()
    llm.load_lora_adapter("late", str(files / "own"))
    llm.unload_lora_adapter("late")
