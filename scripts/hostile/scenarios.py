"""What a hostile client sends: each scenario returns how many of its requests ended how."""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from scripts.hostile.target import DEADLINE, Target

Scenario = Callable[[Target], Counter[int | str]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__.replace("_", "-")] = function
    return function


def generate(target: Target, sampling: dict[str, object] | None = None, **fields: object) -> int | str:
    """The status of a short request."""
    sampling = {"max_new_tokens": 8} | (sampling or {})
    body = {"sampling_params": sampling} | ({"text": "a"} | fields if "input_ids" not in fields else fields)
    return target.post("/generate", json.dumps(body).encode())


def _together(calls: list[Callable[[], int | str]]) -> Counter[int | str]:
    found: Counter[int | str] = Counter()
    threads = [threading.Thread(target=lambda c=call: found.update([c()])) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@scenario
def long_prompts(target: Target) -> Counter[int | str]:
    """A million tokens as text with and without spaces and as ids, 5 MB of messages."""
    messages = [{"role": "user", "content": "word " * 1_000_000}]
    chat = json.dumps({"messages": messages, "model": "default"}).encode()
    return Counter(
        [
            generate(target, text="a b " * 1_000_000),
            generate(target, text="x" * 2_000_000),
            generate(target, input_ids=[5] * 1_000_000),
            target.post("/v1/chat/completions", chat),
            target.post("/tokenize", json.dumps({"prompt": "a b " * 1_000_000}).encode()),
        ]
    )


@scenario
def many_samples(target: Target) -> Counter[int | str]:
    return Counter([generate(target, {"n": 10_000}), generate(target, text=["a"] * 50_000)])


@scenario
def stop_strings(target: Target) -> Counter[int | str]:
    many = [f"{i} never said" for i in range(10_000)]
    return Counter([generate(target, {"stop": many, "max_new_tokens": 500, "ignore_eos": True})])


@scenario
def stop_expressions(target: Target) -> Counter[int | str]:
    expressions = ["((a{1000}){1000}){1000}", "(?:" * 5000 + "a" + ")" * 5000, "(x+x+)+y", "(?:.?){900}zz", r"(a)\1"]
    options = {"max_new_tokens": 200, "ignore_eos": True}
    return _together([lambda e=e: generate(target, options | {"stop_regex": e}) for e in expressions])


@scenario
def grammars(target: Target) -> Counter[int | str]:
    """Endless, huge and empty ones side by side."""
    properties = {f"property {i}": {"type": "string"} for i in range(1000)}
    schemas = [
        '{"items":' * 900 + "{}" + "}" * 900,
        '{"type":"array","items":' * 250 + "{}" + "}" * 250,
        json.dumps({"type": "object", "properties": dict(list(properties.items())[:300])}),
        json.dumps({"type": "object", "properties": properties}),
        json.dumps({"enum": [f"value {i}" for i in range(100_000)]}),
        json.dumps({"allOf": [{"type": "object"}, {"required": ["a"]}]}),
    ]
    calls = [lambda s=s: generate(target, {"json_schema": s}) for s in schemas]
    sources = [{"regex": "((a{1,500}){1,500}){1,500}"}, {"regex": r"[^\s\S]"}, {"ebnf": 'root ::= root "a"'}]
    return _together([*calls, *(lambda s=s: generate(target, s) for s in sources)])


@scenario
def grammar_hang_ups(target: Target) -> Counter[int | str]:
    """Clients that send slow grammars and leave; then somebody with a quick one."""
    properties = {f"property {i}": {"type": "string"} for i in range(900)}
    body = [
        json.dumps(
            {"text": "a", "sampling_params": {"json_schema": json.dumps({"title": f"{i}", "properties": properties})}}
        )
        for i in range(5)
    ]
    _together([lambda b=b: target.post("/generate", b.encode(), timeout=1) for b in body])
    start = time.perf_counter()
    status = generate(target, {"regex": "ab?"})
    return Counter([status, f"quick one after {time.perf_counter() - start:.1f} s"])


@scenario
def not_json(target: Target) -> Counter[int | str]:
    numbers = [b"NaN", b"Infinity", b"1e999", b"-Infinity", b"9" * 5000]
    bodies = [b'{"text": "a", "sampling_params": {"temperature": ' + n + b"}}" for n in numbers]
    bodies += [b"[" * 200_000, b'{"text":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"text": "\xff\xfe"}']
    return Counter(target.post("/generate", body) for body in bodies)


@scenario
def large_bodies(target: Target) -> Counter[int | str]:
    wrong = json.dumps({"messages": [1] * 1_000_000, "model": "default"}).encode()
    return Counter(
        [
            target.post("/v1/chat/completions", wrong, 60),
            target.post("/generate", json.dumps({"text": ["a", 1] * 400_000}).encode(), 60),
            target.post("/generate", b'{"input_ids": [' + b"[1]," * (50 << 20) + b"[1]]}", 60),
            target.post("/generate", b'{"text": "' + b"a" * (200 << 20) + b'"}', 60),
        ]
    )


@scenario
def silent_connections(target: Target) -> Counter[int | str]:
    """500 that say nothing, say half a head or half a body, or read nothing."""
    heads = [
        b"",
        b"POST /generate HTTP/1.1\r\nHost: x\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
    ]
    with contextlib.ExitStack() as stack:
        for number in range(500):
            with contextlib.suppress(OSError):
                one = stack.enter_context(target.socket())
                one.sendall(heads[number % 3])
        status = generate(target)
        time.sleep(5)
    return Counter([status])


@scenario
def header_floods(target: Target) -> Counter[int | str]:
    """Twenty that send headers, a target, a chunk's extension or trailers for as long as they are let."""
    chunked = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    line = b"x-a: " + b"a" * 1000 + b"\r\n"
    floods = [
        (b"GET /health HTTP/1.1\r\n", line),
        (b"GET /", b"a" * 1000),
        (chunked + b"1;a=", b"a" * 1000),
        (chunked + b"0\r\n", line),
    ]

    def flood(begin: bytes, again: bytes) -> int | str:
        end = time.monotonic() + DEADLINE
        with target.socket() as one:
            try:
                one.sendall(begin)
                while time.monotonic() < end:
                    one.sendall(again * 64)
            except OSError:
                return "closed"
        return "timeout"

    return _together([partial(flood, *floods[number % 4]) for number in range(20)])


@scenario
def stalled_streams(target: Target) -> Counter[int | str]:
    """Ten that read nothing for 12 s and then hang up, with as many logprobs as they are given."""
    found: Counter[int | str] = Counter()
    with contextlib.ExitStack() as stack:
        for number in range(10):
            top = 100 if number % 2 else 20
            options = {"max_new_tokens": 450, "ignore_eos": True}
            body = {
                "text": "a",
                "stream": True,
                "return_logprob": True,
                "top_logprobs_num": top,
                "sampling_params": options,
            }
            data = json.dumps(body).encode()
            one = target.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            stack.enter_context(one)
        time.sleep(12)
    found["hung up"] = 10
    time.sleep(3)
    return found


@scenario
def wrong_values(target: Target) -> Counter[int | str]:
    """What has been answered with a 500."""
    kwargs = [
        "add_generation_prompt",
        "tools",
        "messages",
        "self",
        "continue_final_message",
        "conversation",
        "tokenize",
    ]
    chats = [
        {
            "messages": [{"role": "user", "content": "a"}],
            "model": "default",
            "max_tokens": 1,
            "chat_template_kwargs": {k: 1},
        }
        for k in kwargs
    ]
    samplings: list[dict[str, object]] = [
        {"logit_bias": {"9" * 5000: 1}},
        {"stop_regex": "(" * 5000 + ")" * 5000},
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 1e-300},
        {"temperature": 1e39},
        {"temperature": 1e39, "regex": "ab"},
        {"logit_bias": {"1": 1e300}},
    ]
    statuses = [target.post("/v1/chat/completions", json.dumps(chat).encode()) for chat in chats]
    return Counter(statuses + [generate(target, sampling) for sampling in samplings])
