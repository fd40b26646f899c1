"""The server that the contract is held against, and short ways to ask it."""

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer
from fakes.tokenizers import byte_level_tokenizer
from running_server import PATHS, Server, serving

BASE = "multilora-demo"
TEXT = "Q: What"
IDS = [1, 55, 32, 435]
"""What the demo's tokenizer makes of TEXT, BOS first."""
CONTEXT = 2048
EOS, END = 2, 3
"""The two ids of the demo's generation_config; the first one is the tokenizer's EOS too."""
PAGE_ORIGIN = "https://page.example"
LOADED = {"pirate": PATHS["pirate"], "sql": PATHS["sql"]}
"""What the server starts with."""
TOO_LARGE = PATHS["json"]
"""An adapter whose rank, 64, is over the server's limit."""


class ContractServer(Server):
    """A running server that may hold two adapters in a step, four in all, of rank 32 at most."""

    resolver_dir: Path

    def post(self, path: str, body: Any = None, status: int | None = 200, **headers: str) -> httpx.Response:
        """status: what the answer must have; None: anything."""
        response = self.http.post(path, json=body, headers=headers)
        assert status in (None, response.status_code), response.text
        return response

    def get(self, path: str, status: int = 200, **headers: str) -> httpx.Response:
        response = self.http.get(path, headers=headers)
        assert status == response.status_code, response.text
        return response

    def native(self, sampling: dict[str, Any] | None = None, **body: Any) -> Any:
        """The answer of `/generate`; two greedy tokens unless said otherwise."""
        body = body if "input_ids" in body or "text" in body else {"text": TEXT} | body
        return self.post("/generate", {"sampling_params": few(**(sampling or {}))} | body).json()

    def complete(self, **body: Any) -> Any:
        """The answer of `/v1/completions`; two greedy tokens unless said otherwise."""
        return self.post("/v1/completions", COMPLETION | body).json()

    def chat(self, **body: Any) -> Any:
        """The answer of `/v1/chat/completions`; two greedy tokens unless said otherwise."""
        return self.post("/v1/chat/completions", CHAT | body).json()

    def refused(self, path: str, body: Any, *words: str, status: int = 400) -> dict[str, Any]:
        """The error of a request that is refused in these words."""
        error: dict[str, Any] = self.post(path, body, status).json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert all(word in error["message"] for word in words), error
        return error

    def failed(self, path: str, body: Any, *words: str) -> str:
        """The message of a load or unload that fails in SGLang's shape."""
        answer = self.post(path, body, 400).json()
        assert list(answer) == ADAPTER_RESULT
        assert (answer["success"], answer["loaded_adapters"]) == (False, self.loaded_adapters())
        assert all(word in answer["error_message"] for word in words), answer
        return str(answer["error_message"])

    def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream, without the `[DONE]` that must end it."""
        *events, done, rest = self.post(path, body | {"stream": True}).text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def streaming(self, path: str, body: Any) -> AbstractContextManager[httpx.Response]:
        """A stream under way; leaving the context hangs up."""
        return self.http.stream("POST", path, json=body | {"stream": True})

    def loaded_adapters(self) -> dict[str, str]:
        """By `/v1/models`: name → path."""
        return {m["id"]: m["root"] for m in self.get("/v1/models").json()["data"] if m["parent"]}

    @contextlib.contextmanager
    def loaded(self, name: str, path: str = PATHS["french"], **fields: Any) -> Iterator[None]:
        """An adapter that is there for a while."""
        assert self.load(name, path, **fields).status_code == 200
        try:
            yield
        finally:
            self.post("/unload_lora_adapter", {"lora_name": name})


ADAPTER_RESULT = ["rid", "http_worker_ipc", "success", "error_message", "loaded_adapters"]
COMPLETION = {"model": BASE, "prompt": TEXT, "max_tokens": 2, "temperature": 0}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}


def few(**sampling: Any) -> dict[str, Any]:
    """Sampling parameters of two greedy tokens, and these."""
    return {"temperature": 0, "max_new_tokens": 2} | sampling


def start(tmp_path_factory: Any) -> AbstractContextManager[Server]:
    """The server of all checks."""
    resolver_dir = tmp_path_factory.mktemp("resolved")
    ContractServer.resolver_dir = resolver_dir
    return serving(
        tmp_path_factory,
        *("--max-loras-per-batch", "2", "--max-loaded-loras", "4", "--max-lora-rank", "32"),
        *("--cors-origins", PAGE_ORIGIN, "--lora-resolver-dir", str(resolver_dir)),
        *("--lora-paths", f"pirate={PATHS['pirate']}", json.dumps({"lora_name": "sql", "lora_path": PATHS["sql"]})),
        server_class=ContractServer,
    )


def local(defaults: dict[str, Any] | None = None, **options: Any) -> LocalServer:
    """An application with a fake engine, for flags that the shared server cannot have. defaults: what a model's
    generation_config says of sampling."""
    tokenizer = byte_level_tokenizer()
    return LocalServer(FakeEngineClient(vocab_size=tokenizer.vocab_size), tokenizer, defaults, **options)
