"""Points 1 to 5, 14 and 20: what stands in bodies."""

import json
import socket
import threading
import time
from collections.abc import Callable

import httpx

from scripts.hostile.points.record import LONG, PROMPT, TIGHT, Record, ask, generate, head, idle, requests, said
from scripts.hostile.target import Target

WIDE = {f"property {i}": {"type": "string"} for i in range(1000)}


def together(calls: list[Callable[[], httpx.Response]]) -> list[httpx.Response]:
    """The answers of calls that run side by side, in their order."""
    found: list[httpx.Response | None] = [None] * len(calls)

    def one(index: int) -> None:
        found[index] = calls[index]()

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for answer in found if answer is not None]


@requests(1, "stalled streams that hang up", TIGHT)
def stalled_streams(target: Target, record: Record) -> None:
    """With the cap that is the default lifted."""
    sockets = []
    for top in (1024, 1024, 100, 100, 20, 20):
        fields = {
            "text": PROMPT,
            "stream": True,
            "return_logprob": True,
            "top_logprobs_num": top,
            "sampling_params": LONG,
        }
        one = target.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.sendall(head("/generate", json.dumps(fields).encode()))
        sockets.append(one)
    time.sleep(12)
    for one in sockets:
        one.close()
    record.note("6 streams with 20 to 1,024 top logprobs, stalled for 12 s, then closed", "closed", True)
    idle(target, record)


@requests(1, "top_logprobs_num beyond its cap")
def many_logprobs(target: Target, record: Record) -> None:
    answer = generate(target, return_logprob=True, top_logprobs_num=1024)
    record.expect("top_logprobs_num 1024", said(answer, "top_logprobs_num"), "400")


@requests(2, "stop_regex")
def stop_expressions(target: Target, record: Record) -> None:
    bad = ["((a{1000}){1000}){1000}", "a{1000}{1000}", "(?:" * 5000 + "a" + ")" * 5000, r"(a)\1", "(?=a)b", "(" * 400]
    for answer, one in zip(
        together([lambda e=e: generate(target, {"stop_regex": e}) for e in bad]), bad, strict=True
    ):
        record.expect(f"stop_regex {one[:30]}", said(answer, "stop_regex"), "400")
    good = ["(x+x+)+y", "(.*)*(.*)*(.*)*q", "(?:.?){200}zz", "(a|a)*b"]
    options: dict[str, object] = {"max_new_tokens": 200, "ignore_eos": True}
    answers = together([lambda e=e: generate(target, options | {"stop_regex": e}) for e in good])
    record.count(f"{', '.join(good)} over 200 tokens", [a.status_code for a in answers], 200)


def _schemas() -> dict[str, object]:
    nested: dict[str, object] = {}
    for _ in range(300):
        nested = {"type": "array", "items": nested}
    return {
        '{"items": × 900': '{"items":' * 900 + "{}" + "}" * 900,
        "300 nested items": json.dumps(nested),
        "300 optional properties": json.dumps({"type": "object", "properties": dict(list(WIDE.items())[:300])}),
        "1,000 properties": json.dumps({"type": "object", "properties": WIDE}),
        "enum of 100,000": json.dumps({"enum": [f"value {i}" for i in range(100_000)]}),
    }


@requests(3, "grammars that take long or much")
def grammars(target: Target, record: Record) -> None:
    schemas = _schemas()
    answers = together([lambda s=s: generate(target, {"json_schema": s}) for s in schemas.values()])
    for name, answer in zip(schemas, answers, strict=True):
        record.expect(f"schema, {name}", answer.status_code, 200, 400)
    sources = [{"ebnf": 'root ::= root "a"'}, {"regex": r"[^\s\S]"}]
    for source in sources:
        record.expect(str(source), generate(target, source).status_code, 400)
    repeated = {"regex": "((a{1,500}){1,500}){1,500}"}  # which a grammar can say in few words
    record.expect(str(repeated), generate(target, repeated).status_code, 200, 400)


@requests(3, "different schemas of 300 properties")
def many_schemas(target: Target, record: Record) -> None:
    def schema(i: int) -> str:
        return json.dumps({"title": str(i), "type": "object", "properties": dict(list(WIDE.items())[i : 300 + i])})

    sizes = [target.rss_mib()]
    for i in range(8):
        record.expect(f"schema {i}", generate(target, {"json_schema": schema(i)}).status_code, 200, 400)
        sizes.append(target.rss_mib())
    record.note("memory after each (MiB)", sizes, sizes[-1] - sizes[3] < 500)


@requests(3, "clients that leave their grammars")
def left_grammars(target: Target, record: Record) -> None:
    for i in range(6):
        schema = json.dumps({"title": str(i), "type": "object", "properties": WIDE})
        body = {"text": "a", "sampling_params": {"json_schema": schema}}
        threading.Thread(target=ask, args=(target, "POST", "/generate", body), kwargs={"timeout": 1}).start()
    time.sleep(1.5)
    start = time.monotonic()
    answer = generate(target, {"regex": "ab?"})
    took = time.monotonic() - start
    record.note(
        "ab? after 6 that left", f"{answer.status_code} after {took:.1f} s", answer.status_code == 200 and took < 5
    )
    idle(target, record)


@requests(4, "large bodies")
def bodies(target: Target, record: Record) -> None:
    def post(name: str, path: str, body: bytes, *wanted: object, seconds: float = 10) -> None:
        start = time.monotonic()
        status = target.post(path, body, 60)
        took = time.monotonic() - start
        record.note(name, f"{status} after {took:.1f} s", status in wanted and took < seconds)

    post("200 MB text", "/generate", b'{"text": "' + b"a" * (200 << 20) + b'"}', 413)
    post("200 MB of [1],", "/generate", b'{"input_ids": [' + b"[1]," * (50 << 20) + b"[1]]}", 413)
    post("31 MiB text", "/generate", b'{"text": "' + b"a" * (31 << 20) + b'"}', 400)
    post("31 MiB text with spaces", "/generate", b'{"text": "' + b"a b " * (31 << 18) + b'"}', 400)
    post("31 MiB of [1],", "/generate", b'{"input_ids": [' + b"[1]," * (31 << 18) + b"[1]]}", 400)
    post("31 MiB of [", "/generate", b"[" * (31 << 20), 400)
    post("2 MB prompt", "/generate", json.dumps({"text": "x" * 2_000_000}).encode(), 400)
    post(
        "2 MB prompt",
        "/v1/completions",
        json.dumps({"model": "default", "prompt": "x y" * 700_000}).encode(),
        400,
        404,
    )
    wrong = json.dumps({"messages": [1] * 1_300_000, "model": "default"}).encode()
    post("4 MB of wrong messages", "/v1/chat/completions", wrong, 400)
    post("4 MB of wrong texts", "/generate", json.dumps({"text": ["a", 1] * 500_000}).encode(), 400)
    post("4 MB of wrong ids", "/generate", json.dumps({"input_ids": ["a"] * 800_000}).encode(), 400)
    post("as content type only", "/generate", b"\xff\xfe" * 1000, 400)


@requests(5, "stop strings")
def stop_strings(target: Target, record: Record) -> None:
    options: dict[str, object] = {"max_new_tokens": 200, "ignore_eos": True}
    answer = generate(target, options | {"stop": [f"{i} never said" for i in range(10_000)]})
    record.expect("10,000 of them", said(answer, "stop"), "400")
    allowed = [f"{i:02d}" + "never" * 24 for i in range(64)]
    answers = together([lambda: generate(target, options | {"stop": allowed}) for _ in range(8)])
    record.count("8 × 64 long ones over 200 tokens", [a.status_code for a in answers], 200)


KWARGS = ("add_generation_prompt", "tools", "messages", "self", "continue_final_message", "conversation", "tokenize")
NUMBERS: list[tuple[str, dict[str, object]]] = [
    ("logit_bias", {"logit_bias": {"9" * 5000: 1}}),
    ("logit_bias", {"logit_bias": {"1": 1e300}}),
    ("stop_regex", {"stop_regex": "(" * 5000 + ")" * 5000}),
    ("regex", {"regex": "(" * 5000 + ")" * 5000}),
    ("ebnf", {"ebnf": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}),
    ("repetition_penalty", {"repetition_penalty": 1e-38}),
    ("repetition_penalty", {"repetition_penalty": 1e-300}),
    ("temperature", {"temperature": 3.5e38, "regex": "ab"}),
    ("temperature", {"temperature": 1e300}),
    ("regex", {"regex": r"[^\s\S]"}),
    ("ebnf", {"ebnf": 'root ::= "a" root'}),
    ("min_p", {"min_p": 1e39}),
    ("top_k", {"top_k": 10**5000}),
    ("frequency_penalty", {"frequency_penalty": -1e308}),
]


@requests(14, "values that were a 500")
def wrong_values(target: Target, record: Record) -> None:
    for name in KWARGS:
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "chat_template_kwargs": {name: 1}}
        status = ask(target, "POST", "/v1/chat/completions", {"model": "default", **chat}).status_code
        record.expect(f"chat_template_kwargs {name}", status, 200, 400)
    for name, sampling in NUMBERS:
        body = json.dumps({"text": "a", "sampling_params": {"max_new_tokens": 2}}).encode()
        inner = ", ".join(f"{json.dumps(k)}: {_digits(v)}" for k, v in ({"max_new_tokens": 2} | sampling).items())
        body = f'{{"text": "a", "sampling_params": {{{inner}}}}}'.encode()
        answer = httpx.post(
            f"http://{target.host}:{target.port}/generate",
            content=body,
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
        record.expect(
            f"{name} {str(next(iter(sampling.values())))[:24] if name != 'top_k' else '10^5000'}",
            said(answer, name),
            "400",
        )
    for _ in range(10):
        answer = generate(target, {"temperature": 1000, "regex": "(ab|cd){3}", "max_new_tokens": 12})
        text = answer.json().get("text", "")
        if answer.status_code != 200 or not _fits(text):
            record.note("temperature 1000 with a grammar", f"{answer.status_code} {text!r}", False)
    record.note("10 × temperature 1000 with regex (ab|cd){3}", "only what it allows", True)


def _digits(value: object) -> str:
    """As JSON, with integers longer than Python would print."""
    return "1" + "0" * 5000 if isinstance(value, int) and value > 10**100 else json.dumps(value)


def _fits(text: str) -> bool:
    return len(text) <= 6 and all(
        any(w.startswith(text[i : i + 2]) for w in ("ab", "cd")) for i in range(0, len(text), 2)
    )


@requests(20, "schemas that were not enforced")
def schemas(target: Target, record: Record) -> None:
    found = {
        "allOf": {"allOf": [{"type": "object"}, {"required": ["a"]}]},
        "$ref": {"$ref": "https://example.com/schema.json"},
        "not": {"not": {"type": "string"}},
        "if": {"if": {"type": "object"}, "then": {"required": ["a"]}},
        "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    }
    for name, schema in found.items():
        deep = {"type": "object", "properties": {"x": {"items": schema, "type": "array"}}}
        for where, one in (("", schema), (" below a property", deep)):
            answer = generate(target, {"json_schema": json.dumps(one)})
            record.expect(f"{name}{where}", said(answer, name), "400")
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": found["allOf"]}}
    chat = {"model": "default", "messages": [{"role": "user", "content": "a"}], "response_format": form}
    record.expect("allOf as response_format", said(ask(target, "POST", "/v1/chat/completions", chat), "allOf"), "400")
