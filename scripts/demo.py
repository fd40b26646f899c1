"""`make demo`: the real server on the bundled model, and the LoRA documentation's examples against it over HTTP.

Starts `multilora serve` on a free port, prints what each adapter answered, checks every status and answer, stops the
server. Exit code 0: everything was as it should be; 1: it says what was not, and shows the end of the server's log.
"""

import itertools
import json
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from multilora.demo import PROMPTS, adapter_paths

START_SECONDS = 600
STOP_SECONDS = 30
GREEDY = {"temperature": 0, "max_new_tokens": 64}


class DemoError(Exception):
    """Something did not answer as it should have."""


def expect(truth: object, what: str) -> None:
    if not truth:
        raise DemoError(what)


class Demo:
    """The running server as the examples see it. `alone[name]`: each adapter's answer to the first prompt."""

    def __init__(self, http: httpx.Client):
        self.http = http
        self.paths = {name: str(path) for name, path in adapter_paths().items()}
        self.base = self.get("/v1/models")["data"][0]["id"]
        self.alone: dict[str | None, str] = {}

    def get(self, route: str) -> Any:
        answer = self.http.get(route)
        expect(answer.status_code == 200, f"GET {route}: {answer.status_code} {answer.text}")
        return answer.json()

    def post(self, route: str, body: dict[str, Any], status: int = 200) -> Any:
        answer = self.http.post(route, json=body)
        expect(
            answer.status_code == status, f"POST {route} {body}: {answer.status_code}, not {status}: {answer.text}"
        )
        return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else answer.text

    def generate(self, text: Any, lora_path: Any = None, status: int = 200) -> Any:
        body = {"text": text, "sampling_params": GREEDY, "lora_path": lora_path}
        return self.post("/generate", body, status)

    def expect_answer(self, name: str | None, text: str) -> None:
        """The answer to the first prompt must be what `name` said when it was asked first."""
        expect(text == self.alone[name], f"{name or 'base'} answered {text!r}, before it was {self.alone[name]!r}")


def everyone_in_one_batch(demo: Demo) -> None:
    """Every prompt, to the base model and to every adapter, in one request"""
    names = [None, *demo.paths]
    pairs = [(prompt, name) for prompt in PROMPTS for name in names]
    answers = demo.generate([prompt for prompt, _ in pairs], [name for _, name in pairs])
    expect(len(answers) == len(pairs), f"{len(answers)} answers to {len(pairs)} prompts")
    texts = {pair: answer["text"].strip() for pair, answer in zip(pairs, answers, strict=True)}
    for prompt in PROMPTS:
        say(prompt.splitlines()[0])
        for name in names:
            row(name, texts[prompt, name])
    demo.alone = {name: answers[i]["text"] for i, name in enumerate(names)}
    expect(len(set(demo.alone.values())) == len(names), "two of them gave the same answer to the first prompt")


def single_adapter(demo: Demo) -> None:
    """One prompt, one adapter"""
    name = next(iter(demo.paths))
    answer = demo.generate(PROMPTS[0], name)
    row(name, answer["text"])
    demo.expect_answer(name, answer["text"])
    expect(answer["meta_info"]["finish_reason"]["type"] == "stop", f"it did not stop by itself: {answer}")


def two_adapters_and_base(demo: Demo) -> None:
    """A batch with two adapters and null, which is the base model"""
    first, second, *_ = demo.paths
    names = [first, None, second]
    for name, answer in zip(names, demo.generate([PROMPTS[0]] * 3, names), strict=True):
        row(name, answer["text"])
        demo.expect_answer(name, answer["text"])


def load_unload_replace(demo: Demo) -> None:
    """Load, unload, and load under the same name, while the server runs"""
    first, second, *_ = demo.paths
    load = {"lora_name": "guest", "lora_path": demo.paths[first]}
    result = demo.post("/load_lora_adapter", load)
    expect(result["success"] and "guest" in result["loaded_adapters"], f"not loaded: {result}")
    say(f"POST /load_lora_adapter guest = {first}: 200")
    demo.expect_answer(first, shown("guest", demo.generate(PROMPTS[0], "guest")))

    error = demo.post("/load_lora_adapter", load, status=400)["error_message"]
    expect("already loaded" in error, f"loading it twice: {error}")
    say(f"once more: 400, {error}")

    result = demo.post("/unload_lora_adapter", {"lora_name": "guest"})
    expect("guest" not in result["loaded_adapters"], f"still there: {result}")
    error = demo.generate(PROMPTS[0], "guest", status=400)["error"]["message"]
    expect("never been loaded" in error and "guest" in error, f"asking for it: {error}")
    say(f"unloaded; asking for it: 400, {error}")

    demo.post("/load_lora_adapter", {"lora_name": "guest", "lora_path": demo.paths[second]})
    say(f"POST /load_lora_adapter guest = {second}: 200")
    demo.expect_answer(second, shown("guest", demo.generate(PROMPTS[0], "guest")))

    body = {"lora_name": "guest", "lora_path": demo.paths[first], "load_inplace": True}
    demo.post("/v1/load_lora_adapter", body)
    say(f"POST /v1/load_lora_adapter guest = {first}, in place: 200")
    demo.expect_answer(first, shown("guest", demo.generate(PROMPTS[0], "guest")))
    demo.post("/v1/unload_lora_adapter", {"lora_name": "guest"})


def pinning(demo: Demo) -> None:
    """A pinned adapter stays on the device"""
    name = list(demo.paths)[-1]
    demo.post("/load_lora_adapter", {"lora_name": "pinned", "lora_path": demo.paths[name], "pinned": True})
    demo.expect_answer(name, shown("pinned", demo.generate(PROMPTS[0], "pinned")))
    pins = [adapter["lora_name"] for adapter in demo.get("/server_info")["loaded_adapters"] if adapter["pinned"]]
    expect(pins == ["pinned"], f"the server says that these are pinned: {pins}")
    demo.post("/unload_lora_adapter", {"lora_name": "pinned"})


def openai_client(demo: Demo) -> None:
    """The OpenAI client: model="base:adapter", model="adapter", chat, and names that do not exist"""
    client = openai.OpenAI(base_url=f"{str(demo.http.base_url).rstrip('/')}/v1", api_key="none", max_retries=0)
    name = next(iter(demo.paths))
    for model in (f"{demo.base}:{name}", name):
        answer = client.completions.create(model=model, prompt=PROMPTS[0], max_tokens=64, temperature=0)
        say(f'completions, model="{model}"')
        row(name, answer.choices[0].text)
        demo.expect_answer(name, answer.choices[0].text)
    question: Any = {"role": "user", "content": PROMPTS[0].removeprefix("Q: ").splitlines()[0]}
    say(f'chat, model="{demo.base}", "{demo.base}:{name}", …')
    chats = {}
    for adapter in (None, *demo.paths):
        model = f"{demo.base}:{adapter}" if adapter else demo.base
        chat = client.chat.completions.create(model=model, messages=[question], max_tokens=64, temperature=0)
        chats[adapter] = chat.choices[0].message.content or ""
        row(adapter, chats[adapter])
    expect(len(set(chats.values())) == len(chats), "two chats gave the same answer")
    for model, status in ((f"{demo.base}:nobody", 400), ("nobody", 404)):
        try:
            client.completions.create(model=model, prompt="x")
        except openai.APIStatusError as e:
            expect(e.status_code == status, f"model={model!r}: {e.status_code}, not {status}")
            say(f'model="{model}": {status}, {e.body["message"] if isinstance(e.body, dict) else e}')
        else:
            raise DemoError(f"model={model!r} was served")


def streaming(demo: Demo) -> None:
    """A stream: each frame carries the text so far"""
    name = next(iter(demo.paths))
    body = {"text": PROMPTS[0], "sampling_params": GREEDY, "lora_path": name, "stream": True}
    with demo.http.stream("POST", "/generate", json=body) as answer:
        frames = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    expect(frames and frames[-1] == "[DONE]", f"the stream ended with {frames[-1:]}")
    texts = [json.loads(frame)["text"] for frame in frames[:-1]]
    for text in [*texts[:3], *(["…"] if len(texts) > 4 else []), *texts[max(3, len(texts) - 1) :]]:
        row(name, text)
    expect(all(b.startswith(a) for a, b in itertools.pairwise(texts)), "the text was taken back")
    demo.expect_answer(name, texts[-1])


EXAMPLES: list[Callable[[Demo], None]] = [
    everyone_in_one_batch,
    single_adapter,
    two_adapters_and_base,
    load_unload_replace,
    pinning,
    openai_client,
    streaming,
]


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def row(name: str | None, text: str) -> None:
    lines = textwrap.wrap(" ".join(text.split()), 84) or ["(nothing)"]
    print(textwrap.indent("\n".join(lines), " " * 14).replace(" " * 14, f"    {name or 'base':<8}  ", 1), flush=True)


def shown(name: str, answer: dict[str, Any]) -> str:
    text: str = answer["text"]
    row(name, text)
    return text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(log: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """URL and process of a running `multilora serve` with every bundled adapter and `flags`; ended in any case."""
    port = free_port()
    paths = [f"{name}={path}" for name, path in adapter_paths().items()]
    command = [sys.executable, "-m", "multilora", "serve", "--port", str(port), *flags, "--lora-paths", *paths]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_healthy(http: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        expect(process.poll() is None, f"the server ended with code {process.returncode} before it was up")
        try:
            if http.get("/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise DemoError(f"the server was not up after {START_SECONDS} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise DemoError(f"the server was still there {STOP_SECONDS} s after SIGTERM") from None
    expect(code == 0, f"the server ended with code {code}")


def run(log: Path) -> None:
    with server(log) as (url, process), httpx.Client(base_url=url, timeout=120) as http:
        say(f"starting {url} …")
        began = time.monotonic()
        wait_until_healthy(http, process)
        demo = Demo(http)
        say(f"up after {time.monotonic() - began:.1f} s: {demo.base} with {', '.join(demo.paths)}")
        for number, example in enumerate(EXAMPLES, 1):
            print(f"\n{number}. {example.__doc__}", flush=True)
            example(demo)
        stop(process)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        try:
            run(log)
        except (DemoError, httpx.HTTPError, openai.OpenAIError) as e:
            tail = log.read_text(errors="replace").splitlines()[-40:] if log.exists() else []
            print(f"\nFAILED: {e}\n\nThe end of the server's log:\n" + "\n".join(tail), file=sys.stderr)
            return 1
    print("\nEverything answered as it should. The server stopped cleanly.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
