"""The LoRA documentation's examples, as requests over HTTP whose statuses and answers are checked. Called by
`command.py`."""

import importlib.util
import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx

from multilora.cli.demo.output import row, say
from multilora.demo import PROMPTS, adapter_paths

GREEDY = {"temperature": 0, "max_new_tokens": 64}
QUESTION = {"role": "user", "content": PROMPTS[0].removeprefix("Q: ").splitlines()[0]}


class DemoError(Exception):
    """Something did not answer as it should have."""


def expect(truth: object, what: str) -> None:
    """Raise DemoError saying `what` unless `truth`."""
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
    demo.expect_answer(first, _shown("guest", demo.generate(PROMPTS[0], "guest")))

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
    demo.expect_answer(second, _shown("guest", demo.generate(PROMPTS[0], "guest")))

    body = {"lora_name": "guest", "lora_path": demo.paths[first], "load_inplace": True}
    demo.post("/v1/load_lora_adapter", body)
    say(f"POST /v1/load_lora_adapter guest = {first}, in place: 200")
    demo.expect_answer(first, _shown("guest", demo.generate(PROMPTS[0], "guest")))
    demo.post("/v1/unload_lora_adapter", {"lora_name": "guest"})


def pinning(demo: Demo) -> None:
    """A pinned adapter stays on the device"""
    name = list(demo.paths)[-1]
    demo.post("/load_lora_adapter", {"lora_name": "pinned", "lora_path": demo.paths[name], "pinned": True})
    demo.expect_answer(name, _shown("pinned", demo.generate(PROMPTS[0], "pinned")))
    pins = [adapter["lora_name"] for adapter in demo.get("/server_info")["loaded_adapters"] if adapter["pinned"]]
    expect(pins == ["pinned"], f"the server says that these are pinned: {pins}")
    demo.post("/unload_lora_adapter", {"lora_name": "pinned"})


def openai_routes(demo: Demo) -> None:
    """The OpenAI routes: model="base:adapter", model="adapter", chat, and names that do not exist"""
    name = next(iter(demo.paths))
    for model in (f"{demo.base}:{name}", name):
        body = {"model": model, "prompt": PROMPTS[0], "max_tokens": 64, "temperature": 0}
        text = demo.post("/v1/completions", body)["choices"][0]["text"]
        say(f'completions, model="{model}"')
        row(name, text)
        demo.expect_answer(name, text)
    say(f'chat, model="{demo.base}", "{demo.base}:{name}", …')
    chats = {}
    for adapter in (None, *demo.paths):
        body = {"model": _model(demo, adapter), "messages": [QUESTION], "max_tokens": 64, "temperature": 0}
        chats[adapter] = demo.post("/v1/chat/completions", body)["choices"][0]["message"]["content"] or ""
        row(adapter, chats[adapter])
    expect(len(set(chats.values())) == len(chats), "two chats gave the same answer")
    for model, status in ((f"{demo.base}:nobody", 400), ("nobody", 404)):
        error = demo.post("/v1/completions", {"model": model, "prompt": "x"}, status)["error"]
        say(f'model="{model}": {status}, {error["message"]}')


def openai_client(demo: Demo) -> None:
    """The openai package against this server"""
    if importlib.util.find_spec("openai") is None:
        say("not installed here (pip install openai)")
        return
    import openai

    client = openai.OpenAI(base_url=f"{str(demo.http.base_url).rstrip('/')}/v1", api_key="none", max_retries=0)
    for name in demo.paths:
        answer = client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=64, temperature=0)
        row(name, answer.choices[0].text)
        demo.expect_answer(name, answer.choices[0].text)
    try:
        client.completions.create(model="nobody", prompt="x")
    except openai.NotFoundError as e:
        say(f'model="nobody": {type(e).__name__}, {e.body["message"] if isinstance(e.body, dict) else e}')
    else:
        raise DemoError('model="nobody" was served')


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
    openai_routes,
    openai_client,
    streaming,
]


def _shown(name: str, answer: dict[str, Any]) -> str:
    text: str = answer["text"]
    row(name, text)
    return text


def _model(demo: Demo, adapter: str | None) -> str:
    return f"{demo.base}:{adapter}" if adapter else demo.base
