"""The three doors with one shape, so that one test can be held against each: `LLM`, `AsyncLLM` and the HTTP server.

Each has a tiny real engine in this process. Errors that the server answers with come back as the typed errors they
were made of.
"""

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.async_engine import InProcessEngine, RecordingEngine
from fakes.server_app import SECONDS, Answer, LocalServer
from fakes.tokenizers import byte_level_tokenizer
from safetensors.torch import save

from multilora import LLM, AsyncLLM
from multilora.adapters.loading.loader import InlineLoader
from multilora.engine.build import build_engine
from multilora.errors import from_wire
from multilora.front.front import Front
from multilora.front.tokenizer import Tokenizer

_KINDS = {"context_length_exceeded": "PromptTooLong"}
"""Of the server's error codes, those that are not the names of their errors."""

TOKENIZER = byte_level_tokenizer()
ROWS = TOKENIZER.vocab_size + 7
"""Of the tiny model that the doors are tested with."""


@dataclass(frozen=True)
class Result:
    """One answer; logprobs are (logprob, token id) of each of its tokens and of the prompt's."""

    text: str
    token_ids: list[int]
    finish: str
    matched: Any
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[Any] | None = None
    input_logprobs: list[Any] | None = None


class Door:
    """`generate` takes a list of prompts, `params` and `lora_path` as `LLM.generate` does."""

    front: Front
    engine: RecordingEngine
    reads_lists = True  # a request may have several prompts

    def generate(self, prompts: Any, params: Any = None, lora_path: Any = None, **wanted: Any) -> list[Result]:
        raise NotImplementedError

    def load(self, name: str, path: Any, *, pinned: bool = False, replace: bool = False) -> None:
        raise NotImplementedError

    def load_tensors(self, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        raise NotImplementedError

    def compose(self, name: str, parts: Any, *, replace: bool = False) -> None:
        raise NotImplementedError

    def unload(self, name: str) -> None:
        raise NotImplementedError

    def loaded(self) -> dict[str, str]:
        return self.front.registry.loaded()

    def close(self) -> None:
        raise NotImplementedError


def of_completion(answer: Any) -> Result:
    reason = answer.finish_reason
    return Result(
        answer.text,
        answer.token_ids,
        reason.type,
        reason.matched,
        answer.prompt_tokens,
        answer.cached_tokens,
        answer.logprobs,
        answer.input_logprobs,
    )


class LlmDoor(Door):
    def __init__(self, model: Path, **options: Any):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("multilora.llm.offline.build_engine", partial(build_engine, make_loader=InlineLoader))
            patch.setattr("multilora.llm.offline.LocalEngine", RecordingEngine)
            self.llm = LLM(str(model), **options)
        self.front, self.engine = self.llm._front, self.llm._local
        self.load_tensors = self.llm.load_lora_adapter_from_tensors
        self.compose, self.unload = self.llm.compose_lora_adapters, self.llm.unload_lora_adapter
        self.close = self.llm.close

    def generate(self, prompts: Any, params: Any = None, lora_path: Any = None, **wanted: Any) -> list[Result]:
        answers = self.llm.generate(prompts, params, lora_path, **wanted)
        return [of_completion(answer) for answer in (answers if isinstance(answers, list) else [answers])]

    def load(self, name: str, path: Any, *, pinned: bool = False, replace: bool = False) -> None:
        self.llm.load_lora_adapter(name, str(path), pinned, replace=replace)


class LoopDoor(Door):
    """A door of an event loop."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def run(self, work: Any) -> Any:
        async def limited() -> Any:
            return await asyncio.wait_for(work, SECONDS)

        return self._runner.run(limited())


class AsyncDoor(LoopDoor):
    reads_lists = False

    def __init__(self, model: Path, **options: Any):
        super().__init__()
        self.llm = AsyncLLM(str(model), **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fakes.async_engine.build_engine", partial(build_engine, make_loader=InlineLoader))
            patch.setattr("multilora.llm.online.EngineSupervisor", InProcessEngine)
            self.run(self.llm.start())
        self.front, self.engine = self.llm._front, self.llm._started.engine

    def generate(self, prompts: Any, params: Any = None, lora_path: Any = None, **wanted: Any) -> list[Result]:
        async def last(prompt: Any, params: Any, lora_path: Any) -> list[Any]:
            found: dict[int, Any] = {}
            async for answer in self.llm.generate(prompt, params, lora_path, **wanted):
                found[answer.index] = answer
            return [found[index] for index in sorted(found)]

        async def all_of_them() -> list[Any]:
            several = isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list)
            count = len(prompts) if several else 1
            each = zip(
                prompts if several else [prompts], each_of(params, count), each_of(lora_path, count), strict=True
            )
            return await asyncio.gather(*[last(*one) for one in each])

        return [of_completion(answer) for answers in self.run(all_of_them()) for answer in answers]

    def load(self, name: str, path: Any, *, pinned: bool = False, replace: bool = False) -> None:
        self.run(self.llm.load_lora_adapter(name, str(path), pinned, replace=replace))

    def load_tensors(self, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        self.run(self.llm.load_lora_adapter_from_tensors(name, tensors, config))

    def compose(self, name: str, parts: Any, *, replace: bool = False) -> None:
        self.run(self.llm.compose_lora_adapters(name, parts, replace=replace))

    def unload(self, name: str) -> None:
        self.run(self.llm.unload_lora_adapter(name))

    def close(self) -> None:
        self.run(self.llm.close())
        self._runner.close()


def each_of(value: Any, count: int) -> Sequence[Any]:
    """A composition, which is a list of objects, is one value for all."""
    each = isinstance(value, list) and not (value and isinstance(value[0], dict) and "name" in value[0])
    return value if each and len(value) == count else [value] * count


class HttpDoor(LoopDoor):
    def __init__(self, model: Path, **options: Any):
        super().__init__()
        options = {"enable_lora": bool(options.get("lora_paths"))} | options
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fakes.async_engine.build_engine", partial(build_engine, make_loader=InlineLoader))
            made = LocalServer.config_of(model_path=str(model), **options)
            engine = self.run(InProcessEngine.start(made))
        self.server = LocalServer(engine, Tokenizer.of(made), model_path=str(model), **options)
        self.front, self.engine = self.server.driver.front, engine
        self.run(self.server.load_many(list(made.lora_paths)))

    def post(self, path: str, body: dict[str, Any]) -> Answer:
        answer: Answer = self.run(self.server.send("POST", path, body))
        if answer.status != 200:
            error = answer.error if "error" in answer.json() else None
            if error is None:  # SGLang's shape has no kind
                raise from_wire("AdapterError", answer.json()["error_message"])
            raise from_wire(_KINDS.get(error["code"], error["code"]), error["message"])
        return answer

    def generate(self, prompts: Any, params: Any = None, lora_path: Any = None, **wanted: Any) -> list[Result]:
        text = isinstance(prompts, str) or (isinstance(prompts, list) and prompts and isinstance(prompts[0], str))
        several = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], str | list)
        body = {"text" if text else "input_ids": prompts, "sampling_params": params, "lora_path": lora_path} | wanted
        found = self.post("/generate", body).json()
        found = found if isinstance(found, list) else [found]
        samples = len(found) // len(prompts) if several else len(found)
        ordered = [found[j * len(found) // samples + i] for i in range(len(found) // samples) for j in range(samples)]
        return [self._result(answer) for answer in ordered]

    @staticmethod
    def _result(answer: dict[str, Any]) -> Result:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]

        def plain(name: str) -> list[Any] | None:
            return [entry[0] for entry in meta[name]] or None if name in meta else None

        return Result(
            answer["text"],
            answer["output_ids"],
            reason["type"],
            reason.get("matched"),
            meta["prompt_tokens"],
            meta["cached_tokens"],
            plain("output_token_logprobs"),
            plain("input_token_logprobs"),
        )

    def load(self, name: str, path: Any, *, pinned: bool = False, replace: bool = False) -> None:
        body = {"lora_name": name, "lora_path": str(path), "pinned": pinned, "load_inplace": replace}
        self.post("/v1/load_lora_adapter", body)

    def load_tensors(self, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        weights = base64.b64encode(save(tensors)).decode()
        plain = json.loads(json.dumps(config, default=sorted))  # PEFT's own config holds sets
        body = {"lora_name": name, "config_dict": plain, "serialized_tensors": weights}
        self.post("/load_lora_adapter_from_tensors", body)

    def compose(self, name: str, parts: Any, *, replace: bool = False) -> None:
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": parts, "load_inplace": replace})

    def unload(self, name: str) -> None:
        self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def close(self) -> None:
        self.run(self.server.driver.close())
        self._runner.close()


DOORS: dict[str, type[Door]] = {"LLM": LlmDoor, "AsyncLLM": AsyncDoor, "HTTP": HttpDoor}
