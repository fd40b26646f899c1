"""Points 15, 21 and 22: connections, targets and the queue."""

import json
import socket
import statistics
import threading
import time

import httpx

from scripts.hostile.points.record import PROMPT, TIGHT, Record, ask, generate, head, idle, requests
from scripts.hostile.target import Target

ONE = {"text": "a", "sampling_params": {"max_new_tokens": 1}}


@requests(15, "keep-alive requests")
def keep_alive(target: Target, record: Record) -> None:
    with httpx.Client(base_url=f"http://{target.host}:{target.port}", timeout=60) as client:
        for name, call in (
            ("/tokenize", lambda: client.post("/tokenize", json={"prompt": "a"})),
            ("/v1/models", lambda: client.get("/v1/models")),
            ("/generate of one token", lambda: client.post("/generate", json=ONE)),
        ):
            times = []
            for _ in range(100):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1000)
            median = statistics.median(times)
            good = median < 38 or name.startswith("/generate")  # which takes as long as a step of the engine does
            record.note(f"100 × {name} on one connection", f"{median:.1f} ms in the middle", good)


def exchange(target: Target, data: bytes, half_close: bool = False, seconds: float = 20) -> bytes:
    """What comes back until the server closes, or has said nothing more for a while."""
    with target.socket() as one:
        one.settimeout(seconds)
        got = b""
        try:
            one.sendall(data)
            if half_close:
                one.shutdown(socket.SHUT_WR)
            while part := one.recv(65536):
                got += part
        except OSError:
            got += b""
        return got


@requests(22, "odd requests on the wire")
def odd_wire(target: Target, record: Record) -> None:
    body = json.dumps(ONE).encode()
    close = "Connection: close"
    where = f"http://{target.host}:{target.port}"
    for path in (where + "/generate", "http://else.where/generate", "/generate"):
        got = exchange(target, head(path, body, close))
        record.expect(
            f"target {path if 'else' in path or path[0] == '/' else 'http://HOST:PORT/generate'}", got[9:12], b"200"
        )
    got = exchange(target, f"GET {where}/health HTTP/1.1\r\nHost: x\r\n{close}\r\n\r\n".encode())
    record.expect("GET http://HOST:PORT/health", got[9:12], b"200")
    for name, data in (
        ("/health", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("/generate", head("/generate", body)),
    ):
        got = exchange(target, data, half_close=True)
        record.note(f"half-closed after {name}", (got[9:12] or b"closed").decode(), got[9:12] in (b"200", b""))
    long = json.dumps(
        {"text": PROMPT, "stream": True, "sampling_params": {"max_new_tokens": 1900, "ignore_eos": True}}
    )
    exchange(target, head("/generate", long.encode()), half_close=True, seconds=3)
    idle(target, record)
    for name, data in (
        ("no HTTP", b"\x16\x03\x01\x02\x00hello\r\n\r\n"),
        ("two lengths", b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        (
            "length and chunks",
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        ("a length of -1", b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"),
        ("a length of 9 × 100", b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 100 + b"\r\n\r\n"),
        ("a bare LF", b"GET /health HTTP/1.1\nHost: x\n\n"),
        ("zeros in a header", b"GET /health HTTP/1.1\r\nHost: x\r\nx-request-id: a\x00b\r\n\r\n"),
        ("HTTP/9.9", b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n"),
    ):
        got = exchange(target, data, half_close=True, seconds=5)
        record.expect(name, (got[9:12] or b"closed").decode(), "400", "closed", "200", "413", "505")


@requests(22, "what errors repeat of a request")
def echoes(target: Target, record: Record) -> None:
    long = "x" * 1_000_000
    tries: list[tuple[str, object]] = [
        ("/generate", {"text": "a", "lora_path": long}),
        ("/generate", {"text": "a", long: 1}),
        ("/generate", {"text": "a", "sampling_params": {long: 1}}),
        ("/generate", {"text": "a", "sampling_params": {"temperature": long}}),
        ("/generate", {"text": "a", "sampling_params": {"json_schema": '{"type": "' + long + '"}'}}),
        ("/generate", {"text": "a", "rid": long}),
        ("/generate", long),
        ("/v1/chat/completions", {"model": long, "messages": [{"role": "user", "content": "a"}]}),
        ("/v1/chat/completions", {"model": "default", "messages": [{"role": long, "content": "a"}]}),
        ("/v1/completions", {"model": "default", "prompt": {"a": long}}),
        ("/v1/messages", {"model": long, "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}),
        ("/v1/responses", {"model": long, "input": "a"}),
        ("/load_lora_adapter", {"lora_name": "x", "lora_path": long}),
        ("/load_lora_adapter", {"lora_name": long, "lora_path": "x"}),
        ("/unload_lora_adapter", {"lora_name": long}),
        ("/tokenize", {"prompt": {"a": long}}),
    ]
    for path, body in tries:
        answer = ask(target, "POST", path, body)
        field = (
            next((k for k, v in body.items() if len(str(v)) > 1000), "a field") if isinstance(body, dict) else "all"
        )
        got = f"{answer.status_code}, {len(answer.content)} bytes"
        record.note(f"{path}, 1 MB in {field}", got, len(answer.content) < 10_000 and 400 <= answer.status_code < 500)


@requests(21, "the queue's end", TIGHT)
def queue(target: Target, record: Record) -> None:
    answers: list[httpx.Response] = []
    options: dict[str, object] = {"max_new_tokens": 200, "ignore_eos": True}
    threads = [threading.Thread(target=lambda: answers.append(generate(target, options))) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [(a.status_code, "retry-after" in a.headers) for a in answers]
    record.count("40 at once, 10 places: status, Retry-After", found, (200, False), (503, True))
    record.expect("10 samples", generate(target, {"n": 10}).status_code, 200)
    record.expect("11 samples", generate(target, {"n": 11}).status_code, 400)
    idle(target, record)


@requests(21, "as many sequences as the defaults admit")
def many_sequences(target: Target, record: Record) -> None:
    body = {"text": ["a"] * 4096, "sampling_params": {"max_new_tokens": 1}}
    answers: list[httpx.Response] = []

    def one(fields: object) -> None:
        answers.append(ask(target, "POST", "/generate", fields, timeout=240))

    threads = [threading.Thread(target=one, args=(fields,)) for fields in (body, body | {"text": ["a"] * 200})]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    record.count("4,096 prompts, 200 more beside them", [a.status_code for a in answers], 200, 503)
    text = [len(a.json()) for a in answers if a.status_code == 200]
    record.note("answers", text, set(text) <= {4096, 200} and bool(text))
    idle(target, record)
