"""What unmodified clients send: nulls, fields of the peers, numbers, names, and the words that they match."""

import shutil

from .table import Section
from .world import BASE, CHAT, COMPLETION, CONTEXT, IDS, PATHS, TEXT

line = Section("clients", "What real clients send")

line.elsewhere(
    "peers-fields",
    "Every field of both peers can be sent at its default, and as null.",
    "tests/server/test_peer_fields.py::test_every_field_of_the_peers_is_served_at_its_default_and_as_null",
)
line.elsewhere(
    "one-log-line",
    "A field that is ignored is logged once.",
    "tests/server/test_foreign_fields.py::test_each_name_is_logged_once",
)
line.elsewhere(
    "load-generators",
    "What SGLang's and vLLM's load generators, guidellm and aiperf send is served, and what they read is there.",
    "tests/server/test_load_generators.py::test_a_request_of_a_load_generator",
)


@line
def null_is_the_default(server):
    """Null means the default in every optional field, in `sampling_params` too."""
    sampling = dict.fromkeys(("top_p", "top_k", "stop", "n", "min_p", "regex", "logit_bias", "sampling_seed"))
    nulls = dict.fromkeys(("rid", "stream", "return_logprob", "lora_path", "logprob_start_len", "extra_key", "model"))
    assert server.native(sampling, **nulls)["output_ids"] == server.native()["output_ids"]
    nulls = dict.fromkeys(("n", "stop", "logprobs", "echo", "seed", "stream_options", "suffix", "user", "lora_path"))
    assert server.complete(**nulls)["choices"] == server.complete()["choices"]
    nulls = dict.fromkeys(("n", "tools", "tool_choice", "response_format", "logprobs", "max_completion_tokens"))
    assert server.chat(**nulls)["choices"] == server.chat()["choices"]


@line
def fields_without_effect(server):
    """An unknown field is ignored at a neutral value: null, false, empty or a peer's default."""
    neutral = {
        "return_entropy": False,
        "log_metrics": True,
        "image_data": [],
        "session_params": {},
        "bootstrap_room": None,
    }
    assert server.native(**neutral)["output_ids"] == server.native()["output_ids"]
    neutral = {"best_of": 1, "length_penalty": 1.0, "use_beam_search": False, "metadata": {"a": "b"}}
    assert server.complete(**neutral)["choices"] == server.complete()["choices"]


@line
def fields_in_effect(server):
    """A field that would change the answer and is not served is 400 by name, as is one that nobody knows."""
    refused = [
        ("/generate", {"text": TEXT, "return_entropy": True}, "return_entropy"),
        ("/generate", {"text": TEXT, "sampling_params": {"beam": 3}}, "beam"),
        ("/v1/completions", COMPLETION | {"suffix": "x"}, "suffix"),
        ("/v1/completions", COMPLETION | {"best_of": 3}, "best_of"),
        ("/v1/completions", COMPLETION | {"length_penalty": 2.0}, "length_penalty"),
        ("/v1/chat/completions", CHAT | {"maxtokens": 4}, "maxtokens"),
    ]
    for path, body, name in refused:
        assert server.refused(path, body, name)["param"].endswith(name)


@line
def sglang_router(server):
    """What sglang-router adds to each `/generate` is served."""
    added = {"model": None, "log_metrics": True, "return_entropy": False, "stream": False, "priority": None}
    assert server.native(**added)["output_ids"] == server.native()["output_ids"]


@line
def numbers(server):
    """`top_k` 0 and -1 mean all; numbers without a fraction are integers; an empty `json_schema` is none."""
    expected = server.native()["output_ids"]
    for sampling in ({"top_k": 0}, {"top_k": -1}, {"max_new_tokens": 2.0}, {"json_schema": ""}):
        assert server.native(sampling)["output_ids"] == expected, sampling
    assert server.complete(max_tokens=2.0)["usage"]["completion_tokens"] == 2
    server.refused("/v1/completions", COMPLETION | {"max_tokens": 2.5}, "max_tokens")


@line
def models_left_out(server):
    """`model` null, absent or "default" is the base model."""
    for body in ({}, {"model": None}, {"model": "default"}):
        found = server.post("/v1/completions", {"prompt": TEXT, "max_tokens": 1} | body).json()
        assert found["metadata"]["lora_version"] is None


@line
def names_with_slashes(server):
    """Adapter names may hold `/`, as ids of hubs do, on every route that takes one."""
    with server.loaded("org/name"):
        assert server.get("/v1/models/org/name").json()["id"] == "org/name"
        version = server.complete(model="org/name", max_tokens=1)["metadata"]["lora_version"]
        assert server.complete(model=f"{BASE}:org/name", max_tokens=1)["metadata"]["lora_version"] == version
        found = server.native({"max_new_tokens": 1}, lora_path="org/name")
        assert found["meta_info"]["lora_version"] == version


@line
def too_long(server):
    """What does not fit is 400 `context_length_exceeded`, in the words that litellm and langchain match."""
    words = (f"This model's maximum context length is {CONTEXT} tokens. However, you requested", "tokens")
    ids = [5] * (CONTEXT + 100)
    chat = CHAT | {"messages": [{"role": "user", "content": "word " * 3000}]}
    bodies = {"/generate": {"input_ids": ids}, "/v1/completions": COMPLETION | {"prompt": ids}}
    for path, body in (bodies | {"/v1/chat/completions": chat}).items():
        assert server.refused(path, body, *words)["code"] == "context_length_exceeded"


@line
def resolved_adapters(server):
    """A request that names an unknown adapter loads it from a resolver's directory; a name never escapes it."""
    made = server.resolver_dir / "policy_7"
    shutil.copytree(PATHS["french"], made)
    try:
        assert server.complete(model="policy_7", prompt=IDS)["metadata"]["lora_version"]
        assert server.loaded_adapters()["policy_7"] == str(made)
    finally:
        shutil.rmtree(made)
        server.unload("policy_7")
    for name in ("../policy_7", "/etc", "policy_7/../../x"):
        server.refused("/generate", {"text": TEXT, "lora_path": name}, name)


line.elsewhere(
    "tinker",
    "SkyRL's Tinker server writes an adapter below a directory and then names it.",
    "tests/server/test_resolver.py::test_every_way_to_name_an_adapter",
)


@line
def sampling_of_vllm(server):
    """`min_tokens`, `include_stop_str_in_output`, `add_special_tokens` and `chat_template_kwargs` are served."""
    first = server.native({"max_new_tokens": 1})["text"]
    found = server.complete(stop=[first], include_stop_str_in_output=True)["choices"][0]
    assert (found["text"], found["finish_reason"]) == (first, "stop")
    assert server.complete(min_tokens=2, logit_bias={"2": 100})["usage"]["completion_tokens"] == 2
    assert server.complete(add_special_tokens=False)["usage"]["prompt_tokens"] == 3
    assert server.chat(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    begun = [*CHAT["messages"], {"role": "assistant", "content": "The"}]
    continued = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    assert server.chat(**continued, echo=True)["choices"][0]["message"]["content"].startswith("The")
