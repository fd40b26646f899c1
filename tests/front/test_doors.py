"""Requests through every door: the same answers, the same refusals, the same words to the engine.

Covers `front.py`, `request_front.py`, `admission.py`, `generation.py`, `effects.py`, `engine_link.py`, `observer.py`
too.
"""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from doors import DOORS, ROWS, TOKENIZER, Door

from multilora.engine.messages import Submit, UseTokenizer
from multilora.errors import BadRequest, LoraNotEnabled, MultiloraError, PromptTooLong, UnknownAdapter

GREEDY = {"temperature": 0.0, "max_new_tokens": 6}
TEXT = "the cat and the dog, then the end."
IDS = TOKENIZER.encode(TEXT)
EOS = 1
MIX = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": -1}]


def tokens(door: Door, *args: Any, **wanted: Any) -> list[list[int]]:
    return [answer.token_ids for answer in door.generate(*args, **wanted)]


# ---------------------------------------------------------------------- answers


def test_text_and_ids(door: Door) -> None:
    [one] = door.generate(TEXT, GREEDY)
    assert (len(one.token_ids), one.finish, one.prompt_tokens) == (6, "length", len(IDS))
    assert one.text == TOKENIZER.decode(one.token_ids)
    assert tokens(door, IDS, GREEDY) == [one.token_ids]
    assert tokens(door, [TEXT, "another"], GREEDY) == [one.token_ids, *tokens(door, "another", GREEDY)]
    assert tokens(door, [IDS, [5]], GREEDY) == [one.token_ids, *tokens(door, [5], GREEDY)]


def test_parameters_and_adapters_of_each(door: Door) -> None:
    names = [None, "a", "b"]
    alone = [tokens(door, TEXT, GREEDY, name)[0] for name in names]
    assert len(set(map(tuple, alone))) == 3
    assert tokens(door, [TEXT] * 3, GREEDY, names) == alone
    assert tokens(door, [TEXT] * 2, GREEDY, "b") == [alone[2]] * 2
    lengths = [len(ids) for ids in tokens(door, [TEXT] * 2, [GREEDY | {"max_new_tokens": 2}, GREEDY], ["a", None])]
    assert lengths == [2, 6]


def test_compositions(door: Door) -> None:
    found = [tokens(door, TEXT, GREEDY, parts)[0] for parts in (None, "a", "b", MIX, MIX[:1])]
    assert len(set(map(tuple, found))) == 5
    assert tokens(door, [TEXT] * 2, GREEDY, MIX[::-1]) == [found[3]] * 2
    assert tokens(door, [TEXT] * 3, GREEDY, [MIX, "a", None]) == [found[3], found[1], found[0]]


def test_samples(door: Door) -> None:
    params = {"n": 3, "sampling_seed": 5, "max_new_tokens": 8}
    found = tokens(door, [TEXT, "another"], params, ["a", None])
    assert len(found) == 6
    assert len(set(map(tuple, found[:3]))) == 3
    assert tokens(door, TEXT, params, "a") == found[:3]
    assert tokens(door, TEXT, params | {"n": 1, "sampling_seed": 6}, "a") == [found[1]]


def test_logprobs(door: Door) -> None:
    [answer] = door.generate(TEXT, GREEDY, "a", return_logprob=True, logprob_start_len=3, top_logprobs_num=2)
    assert (len(answer.logprobs), len(answer.input_logprobs)) == (6, len(IDS) - 3)
    [answer] = door.generate(TEXT, GREEDY, "a", return_logprob=True)
    assert (len(answer.logprobs), answer.input_logprobs) == (6, None)
    [plain] = door.generate(TEXT, GREEDY, "a")
    assert plain.logprobs is plain.input_logprobs is None
    assert plain.cached_tokens == (len(IDS) - 1) // 16 * 16


def test_a_stop_string_cuts_text_and_tokens(door: Door) -> None:
    params = GREEDY | {"max_new_tokens": 20, "ignore_eos": True, "logit_bias": {"70": 4.0}}
    [free] = door.generate(TEXT, params)
    stop = TOKENIZER.decode([70])
    [answer] = door.generate(TEXT, params | {"stop": stop})
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.token_ids == free.token_ids[: free.token_ids.index(70) + 1]
    assert (answer.finish, answer.matched) == ("stop", stop)


def test_grammars(door: Door) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
    params = [
        {"json_schema": json.dumps(schema), "max_new_tokens": 60, "sampling_seed": 1},
        {"regex": "[0-9]{3}-(yes|no)", "max_new_tokens": 60, "temperature": 2.0, "sampling_seed": 3},
        {"ebnf": 'root ::= "<" [a-c]+ ">"', "max_new_tokens": 60, "temperature": 0.8, "sampling_seed": 3},
        GREEDY,
    ]
    names = ["a", "b", None, "b"]
    answers = door.generate([TEXT] * 4, params, names)
    found = json.loads(answers[0].text)
    assert set(found) == {"name", "legs"} and found["name"] in ("cat", "dog")
    assert re.fullmatch("[0-9]{3}-(yes|no)", answers[1].text)
    assert re.fullmatch("<[a-c]+>?", answers[2].text)
    assert [(a.finish, a.matched) for a in answers[:2]] == [("stop", EOS)] * 2
    assert answers[3].token_ids == tokens(door, TEXT, GREEDY, "b")[0]


# ---------------------------------------------------------------------- refusals

LONE: dict[str, tuple[dict[str, Any], type[MultiloraError], str]] = {
    "no ids": ({"prompts": []}, BadRequest, "no prompts, the list is empty"),
    "negative id": ({"prompts": [-1]}, BadRequest, "token id -1 is outside"),
    "id over the vocabulary": ({"prompts": [5, ROWS]}, BadRequest, f"token id {ROWS} is outside"),
    "enormous id": ({"prompts": [10**30]}, BadRequest, "token id 1000|input_ids"),
    "id as a float": ({"prompts": [5, 0.5]}, BadRequest, "input_ids|token ids"),
    "id as a bool": ({"prompts": [True, False, 5]}, BadRequest, "input_ids|token ids"),
    "a bool among ids": ({"prompts": [5, True]}, BadRequest, "input_ids|token ids"),
    "as long as the context": (
        {"prompts": [5] * 256},
        PromptTooLong,
        "is 256 tokens. However, you requested 257 tokens",
    ),
    "unknown adapter": ({"lora_path": "nope"}, UnknownAdapter, "'nope' has never been loaded"),
    "unknown part": ({"lora_path": [MIX[0], {"name": "nope"}]}, UnknownAdapter, "'nope' has never been loaded"),
    "the same part twice": ({"lora_path": [MIX[0], MIX[0]]}, BadRequest, "comes twice"),
    "the base model as a part": ({"lora_path": [{"name": None}]}, BadRequest, "the base model is always there"),
    "a weight that is not finite": ({"lora_path": [{"name": "a", "weight": 1e39}]}, BadRequest, "finite"),
    "lora_path of a wrong type": ({"lora_path": 5}, BadRequest, "lora_path"),
    "unknown parameter": ({"params": {"temprature": 1}}, BadRequest, "temprature"),
    "negative temperature": ({"params": {"temperature": -1}}, BadRequest, "temperature = -1"),
    "temperature as text": ({"params": {"temperature": "hot"}}, BadRequest, "'hot'"),
    "top_p": ({"params": {"top_p": 0}}, BadRequest, "top_p = 0"),
    "top_k": ({"params": {"top_k": -2}}, BadRequest, "top_k = -2"),
    "n": ({"params": {"n": 0}}, BadRequest, "n = 0"),
    "max_new_tokens": ({"params": {"max_new_tokens": -1}}, BadRequest, "max_new_tokens"),
    "empty stop": ({"params": {"stop": ""}}, BadRequest, "stop"),
    "bad stop_regex": ({"params": {"stop_regex": "("}}, BadRequest, "stop_regex"),
    "bad regex": ({"params": {"regex": "["}}, BadRequest, "regex is not a usable grammar"),
    "bad schema": ({"params": {"json_schema": "{"}}, BadRequest, "json_schema is not a usable grammar"),
    "two grammars": ({"params": {"regex": "a", "ebnf": "b"}}, BadRequest, "only one grammar"),
    "bias outside": ({"params": {"logit_bias": {"999": 1}}}, BadRequest, "logit_bias: token id 999"),
    "stop token outside": ({"params": {"stop_token_ids": [999]}}, BadRequest, "stop_token_ids: token id 999"),
    "logprob_start_len": ({"logprob_start_len": 9999}, BadRequest, "logprob_start_len = 9999: the prompt has"),
    "negative logprob_start_len": ({"logprob_start_len": -7}, BadRequest, "logprob_start_len = -7"),
    "top_logprobs_num": ({"top_logprobs_num": 10**6}, BadRequest, "top_logprobs_num = 1000000: must be 0 to"),
    "negative top_logprobs_num": ({"top_logprobs_num": -1}, BadRequest, "top_logprobs_num = -1"),
}


@pytest.mark.parametrize("case", LONE)
def test_refusals_come_before_anything_is_sent(door: Door, case: str) -> None:
    request, error, says = LONE[case]
    wanted = {"return_logprob": True} | {k: v for k, v in request.items() if "logprob" in k}
    sent = len(door.engine.told)
    with pytest.raises(error, match=says):
        door.generate(request.get("prompts", TEXT), request.get("params", GREEDY), request.get("lora_path"), **wanted)
    assert [message for message in door.engine.told[sent:] if not isinstance(message, UseTokenizer)] == []
    assert [ref.num_requests for ref in door.front.registry.refs()] == [0, 0]
    assert door.front.in_flight == 0


LISTS: dict[str, tuple[dict[str, Any], type[MultiloraError], str]] = {
    "an empty item": ({"prompts": [[5], []]}, BadRequest, "the prompt is empty"),
    "ids of an item as bools": ({"prompts": [[5], [True]]}, BadRequest, "input_ids|token ids"),
    "one bad prompt": ({"prompts": [[5], [9999]]}, BadRequest, "token id 9999"),
    "one unknown adapter": ({"lora_path": ["a", "nope"]}, UnknownAdapter, "'nope'"),
    "short lora_path": ({"lora_path": ["a"]}, BadRequest, "lora_path has 1 entries for 2 inputs"),
    "short sampling_params": ({"params": [GREEDY]}, BadRequest, "sampling_params has 1 entries for 2 inputs"),
    "one bad grammar": ({"params": [GREEDY, {"regex": "("}]}, BadRequest, "regex"),
    "one bad stop token": ({"params": [GREEDY, {"stop_token_ids": [5000]}]}, BadRequest, "5000"),
}


@pytest.mark.parametrize("case", LISTS)
def test_one_refusal_refuses_all(door: Door, case: str) -> None:
    if not door.reads_lists:
        pytest.skip("takes one prompt at a time")
    request, error, says = LISTS[case]
    sent = len(door.engine.told)
    with pytest.raises(error, match=says):
        door.generate(request.get("prompts", [TEXT] * 2), request.get("params", GREEDY), request.get("lora_path"))
    assert [message for message in door.engine.told[sent:] if not isinstance(message, UseTokenizer)] == []
    assert [ref.num_requests for ref in door.front.registry.refs()] == [0, 0]


# ---------------------------------------------------------------------- other engines


@pytest.mark.parametrize("name", DOORS)
def test_the_engine_is_told_the_same(name: str, door_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through every door as through `LLM`, the ids of requests aside; grammars end at every EOS of the model."""
    config = json.loads((door_files / "model" / "config.json").read_text()) | {"eos_token_id": [EOS, 9]}
    told = []
    (door_files / "two_ends").mkdir(exist_ok=True)
    for file in (door_files / "model").iterdir():
        target = door_files / "two_ends" / file.name
        if not target.exists():
            target.symlink_to(file)
    (door_files / "two_ends" / "config.json").unlink()
    (door_files / "two_ends" / "config.json").write_text(json.dumps(config))
    (door_files / "two_ends" / "generation_config.json").unlink(missing_ok=True)
    for made in ("LLM", name):
        door = DOORS[made](door_files / "two_ends", enable_lora=True, device="cpu", max_total_tokens=2048)
        door.load("x", door_files / "a", pinned=True)
        door.load("own", door_files / "own")
        door.compose("mix", [{"name": "x", "weight": 0.5}])
        params = {"n": 2, "sampling_seed": 3, "max_new_tokens": 3, "stop": "zzz", "min_new_tokens": 1}
        door.generate(TEXT, params, "mix", return_logprob=True, logprob_start_len=1, top_logprobs_num=2)
        door.generate(TEXT, GREEDY | {"regex": "[a-z]{3}"}, "x")
        door.generate(TEXT, GREEDY, "own")
        door.unload("mix")
        door.unload("x")
        told.append([plain(message) for message in door.engine.told])
        door.close()
    assert told[0] == told[1]
    [info] = [message for message in told[1] if isinstance(message, UseTokenizer)]
    assert json.loads(info.info)["stop_token_ids"] == [EOS, 9]


def plain(message: Any) -> Any:
    """Without what is unique to a request."""
    return msgspec.structs.replace(message, rid="") if isinstance(message, Submit) else message


@pytest.mark.parametrize("name", DOORS)
def test_without_lora_and_tokenizer(name: str, door_files: Path) -> None:
    options = {"skip_tokenizer_init": True, "enable_lora": False, "device": "cpu", "max_total_tokens": 512}
    door = DOORS[name](door_files / "model", **options)
    [answer] = door.generate([5, 6, 7], GREEDY)
    assert (len(answer.token_ids), answer.text) == (6, "")
    for prompt, params in ((TEXT, None), ([5, 6], {"stop": "x"}), ([5, 6], {"regex": "x"})):
        with pytest.raises(BadRequest, match="a tokenizer"):
            door.generate(prompt, params)
    for refused in (lambda: door.generate([5], GREEDY, "a"), lambda: door.load("a", door_files / "a")):
        with pytest.raises(LoraNotEnabled):
            refused()
    door.close()
