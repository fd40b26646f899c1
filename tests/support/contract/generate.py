"""`POST /generate`, SGLang's native route: bodies, answers, streams, logprobs."""

import itertools
import math
import threading

import pytest

from multilora.params import SamplingParams

from .table import Section
from .world import CONTEXT, END, EOS, IDS, TEXT, few, local

line = Section("generate", "POST /generate")

FORCED_END = {"logit_bias": {str(END): 1000}}
FORCED_EOS = {"logit_bias": {str(EOS): 1000}}


def same(found: object, expected: object) -> bool:
    """Logprobs of two computations that batch differently."""
    return found == pytest.approx(expected, abs=1e-3)


@line
def text_or_ids(server):
    """`text` is a string or a list, `input_ids` a list of ids or a list of lists."""
    one = server.native(text=TEXT)
    assert server.native(input_ids=IDS)["output_ids"] == one["output_ids"]
    for body in ({"text": [TEXT, TEXT]}, {"input_ids": [IDS, IDS]}):
        assert [item["output_ids"] for item in server.native(**body)] == [one["output_ids"]] * 2


@line
def one_or_list(server):
    """One input is answered by one object, a list, also of one, by a list in input order."""
    assert isinstance(server.native(text=TEXT), dict)
    assert isinstance(server.native(text=[TEXT]), list)
    texts = [TEXT + " one", TEXT, TEXT + " two three"]
    lengths = [item["meta_info"]["prompt_tokens"] for item in server.native(text=texts)]
    assert lengths == [server.native(text=text)["meta_info"]["prompt_tokens"] for text in texts]


@line
def sampling_params_per_item(server):
    """`sampling_params` is an object for all items, or a list with one for each."""
    each = [few(max_new_tokens=1), few(max_new_tokens=3)]
    found = server.post("/generate", {"text": [TEXT] * 2, "sampling_params": each}).json()
    assert [item["meta_info"]["completion_tokens"] for item in found] == [1, 3]


@line
def lora_path_per_item(server):
    """`lora_path` is a name for all items, or a list in which `null` is the base model."""
    for path, versions in (("sql", [2, 2]), (["pirate", None], [1, None]), (None, [None, None])):
        found = server.native(text=[TEXT] * 2, lora_path=path)
        assert [item["meta_info"]["lora_version"] for item in found] == versions


@line
def samples_of_a_batch(server):
    """With `n` = k over b prompts, answer j to prompt i has index j·b + i."""
    texts = [TEXT, TEXT + " a b c"]
    found = server.native({"n": 3}, text=texts)
    short, long = (item["meta_info"]["prompt_tokens"] for item in server.native(text=texts))
    assert [item["meta_info"]["prompt_tokens"] for item in found] == [short, long] * 3
    assert len(server.native({"n": 2}, text=TEXT)) == 2


@line
def answer_object(server):
    """An answer has `text`, `output_ids` and `meta_info` with the counts, the latency and the weights' version."""
    found = server.native()
    assert list(found) == ["text", "output_ids", "meta_info"]
    meta = found["meta_info"]
    assert {"id", "finish_reason", "e2e_latency", "weight_version"} <= set(meta)
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(IDS), 2)
    assert isinstance(meta["cached_tokens"], int)
    assert meta["weight_version"] == "default"
    assert meta["e2e_latency"] > 0


@line
def request_ids(server):
    """`rid` is the answer's `meta_info.id`."""
    assert server.native(rid="mine")["meta_info"]["id"] == "mine"


@line
def finish_reasons(server):
    """`finish_reason` is `stop` with the token id or the string that matched, or `length` with the number."""

    def reason(**sampling):
        return server.native(sampling)["meta_info"]["finish_reason"]

    first = server.native({"max_new_tokens": 1})
    assert reason() == {"type": "length", "length": 2}
    assert reason(stop=[first["text"]]) == {"type": "stop", "matched": first["text"]}
    assert reason(stop_token_ids=first["output_ids"]) == {"type": "stop", "matched": first["output_ids"][0]}


@line
def aborted(server):
    """An aborted request ends with `abort` and a message."""
    body = {"text": TEXT, "rid": "long", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
    with server.streaming("/generate", body) as response:
        events = response.iter_lines()
        next(events)
        server.post("/abort_request", {"rid": "long"})
        *_, last, done = [event for event in events if event]
    assert done == "data: [DONE]"
    assert '"finish_reason":{"type":"abort","message":' in last


@line
def every_eos(server):
    """Every id of `generation_config.eos_token_id` and the tokenizer's ends an answer; it is counted, but no text."""
    for token, bias in ((EOS, FORCED_EOS), (END, FORCED_END)):
        found = server.native(bias)
        assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
        assert (found["text"], found["output_ids"]) == ("", [token])
        assert found["meta_info"]["completion_tokens"] == 1
    ignored = server.native(FORCED_END | {"ignore_eos": True})
    assert ignored["output_ids"] == [END, END]


@line
def bos_once(server):
    """A prompt has BOS once, also when the text has it already."""
    found = server.native(text="<|bos|>" + TEXT, return_logprob=True, logprob_start_len=0)
    assert [token for _, token, _ in found["meta_info"]["input_token_logprobs"]] == IDS


@line
def logprobs_are_raw(server):
    """Logprobs are the log-softmax of the logits, before temperature and penalties."""
    wanted = {"return_logprob": True, "top_logprobs_num": 3}
    plain = server.native({"max_new_tokens": 1}, **wanted)["meta_info"]["output_top_logprobs"]
    sampling = {"max_new_tokens": 1, "temperature": 3.0, "repetition_penalty": 1.9, "presence_penalty": 1.5}
    edited = server.native(sampling, **wanted)["meta_info"]["output_top_logprobs"]
    assert [triple[1] for triple in plain[0]] == [triple[1] for triple in edited[0]]
    assert same([triple[0] for triple in edited[0]], [triple[0] for triple in plain[0]])


@line
def logprob_triples(server):
    """Logprobs are `[logprob, token id, text or null]`, the first input one null; top ones are lists of triples."""
    wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    meta = server.native(**wanted, return_text_in_logprobs=True)["meta_info"]
    first, second = meta["input_token_logprobs"][:2]
    assert first == [None, IDS[0], "<|bos|>"]
    assert second[0] < 0
    assert second[1:] == [IDS[1], "Q"]
    assert meta["input_top_logprobs"][0] is None
    assert len(meta["input_top_logprobs"]) == len(meta["input_token_logprobs"]) == len(IDS)
    assert len(meta["output_top_logprobs"]) == len(meta["output_token_logprobs"]) == 2
    assert [triple[2] for triple in server.native(return_logprob=True)["meta_info"]["output_token_logprobs"]] == [
        None,
        None,
    ]
    for triples in meta["output_top_logprobs"]:
        assert len(triples) == 2
        assert all(math.isfinite(p) and isinstance(token, int) for p, token, _ in triples)


@line
def first_logprob_of_a_later_start(server):
    """With `logprob_start_len` over 0 the first input logprob is null, too."""
    wanted = {"return_logprob": True, "logprob_start_len": 2, "top_logprobs_num": 1}
    meta = server.native(**wanted)["meta_info"]
    assert [(p is None, token) for p, token, _ in meta["input_token_logprobs"]] == [(True, IDS[2]), (False, IDS[3])]
    assert [triples is None for triples in meta["input_top_logprobs"]] == [True, False]


@line
def logprobs_of_a_cached_prefix(server):
    """A `logprob_start_len` below the cached length limits what is taken from the cache."""
    prompt = [7 + i % 90 for i in range(40)]
    server.native({"max_new_tokens": 1}, input_ids=prompt)
    assert server.native({"max_new_tokens": 1}, input_ids=prompt)["meta_info"]["cached_tokens"] == 32
    wanted = {"return_logprob": True, "logprob_start_len": 20}
    meta = server.native({"max_new_tokens": 1}, input_ids=prompt, **wanted)["meta_info"]
    assert meta["cached_tokens"] <= 20
    assert [token for _, token, _ in meta["input_token_logprobs"]] == prompt[20:]


@line
def sampling_defaults():
    """Sampling parameters have SGLang's names and defaults."""
    expected = {"max_new_tokens": 128, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "n": 1}
    expected |= {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    expected |= {"ignore_eos": False, "skip_special_tokens": True, "spaces_between_special_tokens": True}
    expected |= {"no_stop_trim": False, "stop_regex": None, "logit_bias": None, "sampling_seed": None}
    expected |= {"json_schema": None, "regex": None, "ebnf": None, "stop": None, "stop_token_ids": None}
    found = SamplingParams.parse({})
    assert {name: getattr(found, name) or None for name in expected} == {k: v or None for k, v in expected.items()}


@line
def sampling_parameters_are_served(server):
    """Each of them can be set, and together they make an answer; of the three grammars one at a time."""
    sampling = {"max_new_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "n": 1}
    sampling |= {"frequency_penalty": 0.1, "presence_penalty": 0.1, "repetition_penalty": 1.1, "min_new_tokens": 2}
    sampling |= {"stop": ["zzz"], "stop_token_ids": [9], "stop_regex": "z{9}", "logit_bias": {"9": -1.0}}
    sampling |= {"sampling_seed": 4, "skip_special_tokens": False, "spaces_between_special_tokens": False}
    sampling |= {"ignore_eos": True, "no_stop_trim": True}
    first = server.native(sampling)
    assert first["meta_info"]["completion_tokens"] == 3
    assert server.native(sampling)["output_ids"] == first["output_ids"], "sampling_seed"
    for grammar in ({"json_schema": '{"const": "a"}'}, {"regex": '"a"'}, {"ebnf": 'root ::= "\\"a\\""'}):
        assert server.native(grammar | {"max_new_tokens": 8})["text"] == '"a"', grammar
    error = server.refused("/generate", {"text": TEXT, "sampling_params": {"regex": "a", "ebnf": "b"}})
    assert "regex" in error["message"]


@line
def bad_sampling_parameters(server):
    """A bad value is 400 and names field and value."""
    bad = {"temperature": -0.5, "top_p": 1.5, "top_k": -7, "min_p": 2.0, "repetition_penalty": 0.0, "n": 0}
    bad |= {"frequency_penalty": 3.5, "presence_penalty": -3.5, "max_new_tokens": -4, "min_new_tokens": -4}
    for field, value in bad.items():
        error = server.refused("/generate", {"text": TEXT, "sampling_params": {field: value}}, field, str(value))
        assert error["param"] == field
    error = server.refused("/generate", {"text": TEXT, "sampling_params": {"stop_token_ids": [99_999]}}, "99999")
    assert error["param"] == "stop_token_ids"


@line
def streams(server):
    """A stream is `data: {json}` frames with all the text so far, the last with the finish reason, then `[DONE]`."""
    events = server.events("/generate", {"text": TEXT, "sampling_params": few(max_new_tokens=3)})
    texts = [event["text"] for event in events]
    assert len(texts) == 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [event["meta_info"]["finish_reason"] is None for event in events] == [True, True, False]
    assert texts[-1] == server.native({"max_new_tokens": 3})["text"]
    assert "index" not in events[0]


@line
def streams_of_a_batch(server):
    """Frames of a batch carry `index`."""
    events = server.events("/generate", {"text": [TEXT] * 2, "sampling_params": few()})
    last = {event["index"]: event["meta_info"]["finish_reason"] for event in events}
    assert last == {i: {"type": "length", "length": 2} for i in (0, 1)}


line.elsewhere(
    "error-inside-a-stream",
    "An error inside a stream is one error frame, then `[DONE]`.",
    "tests/server/test_streaming.py::test_an_error_inside_is_one_frame_before_done",
)


@line
def neither_text_nor_ids(server):
    """Neither `text` nor `input_ids` is 400, and so are both."""
    server.refused("/generate", {}, "text", "input_ids")
    server.refused("/generate", {"text": TEXT, "input_ids": IDS}, "text", "input_ids")


@line
def unknown_adapters(server):
    """An unknown adapter is 400 with "never been loaded" and the name."""
    error = server.refused("/generate", {"text": TEXT, "lora_path": "nope"}, "never been loaded", "'nope'")
    assert error["param"] == "lora_path"


@line
def lora_off():
    """An adapter that is asked for while LoRA is off is 400 with "LoRA" and "not enabled"."""
    answer = local(enable_lora=False).post("/generate", {"text": TEXT, "lora_path": "a"})
    assert answer.status == 400
    assert "LoRA" in answer.error["message"]
    assert "not enabled" in answer.error["message"]


@line
def lists_of_another_length(server):
    """A `lora_path` list of the wrong length is 400."""
    for text, path in ((TEXT, ["pirate", "sql"]), ([TEXT] * 2, ["sql"])):
        error = server.refused("/generate", {"text": text, "lora_path": path}, "lora_path", "entries")
        assert error["param"] == "lora_path"


@line
def token_ids_of_no_token(server):
    """A token id outside the vocabulary, a negative one or an empty list is 400 and named."""
    for ids, named in (([5, 1024], "1024"), ([-1], "-1"), ([], "empty"), ([[5], []], "empty")):
        assert server.refused("/generate", {"input_ids": ids}, named)["param"] == "input_ids"


@line
def too_long_a_prompt(server):
    """A prompt as long as the context is 400; prompt and answer beyond it end at the context with `length`."""
    error = server.refused("/generate", {"input_ids": [5] * CONTEXT}, "maximum context length is 2048 tokens")
    assert error["code"] == "context_length_exceeded"
    s = local()
    answer = s.post("/generate", {"input_ids": [5] * 250, "sampling_params": {"max_new_tokens": 100}}).json()
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 6}


@line
def more_adapters_than_may_be_loaded():
    """More unique names in a request than `--max-loaded-loras` is 400."""
    s = local(max_loaded_loras=1)
    s.load("a", "b")
    answer = s.post("/generate", {"text": [TEXT] * 2, "lora_path": ["a", "b"]})
    assert answer.status == 400
    assert "--max-loaded-loras" in answer.error["message"]


@line
def abort_request(server):
    """`POST /abort_request` takes `rid` or `abort_all`, and 400 is what neither of them is."""
    server.post("/abort_request", {"rid": "nobody"})
    server.post("/abort_request", {"abort_all": True})
    server.refused("/abort_request", {}, "rid", "abort_all")
    body = {"text": TEXT, "rid": "held", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
    found = []
    thread = threading.Thread(target=lambda: found.append(server.post("/generate", body).json()))
    thread.start()
    while not server.metric("vllm:num_requests_running"):
        pass
    server.post("/abort_request", {"abort_all": True})
    thread.join()
    assert found[0]["meta_info"]["finish_reason"]["type"] == "abort"
