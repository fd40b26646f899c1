"""Where the rollouts of a training loop come from: the engine in this process, or a server over HTTP.

Both publish each version of the policy as an adapter of its own, sent as tensors, and sample from the version that
was published last. The old version is unloaded as soon as the new one is there.
"""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors.torch import save

from multilora import LLM


@dataclass(frozen=True)
class Rollout:
    """One answer: its token ids (the end token is one of them) and the natural logarithm of each probability."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    complete: bool  # the policy ended it, and not the limit of tokens


class Rollouts(Protocol):
    """What the training loop needs of an inference engine."""

    def publish(self, step: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        """Sample from these weights from now on. `tensors` and `config` are what PEFT would have saved."""
        ...

    def sample(self, prompts: Sequence[list[int]], n: int, sampling_params: dict[str, Any]) -> list[list[Rollout]]:
        """`n` answers to each prompt."""
        ...

    def close(self) -> None: ...


class InProcess:
    """The whole engine in this process; float32, so that its logprobs can be held against the trainer's."""

    def __init__(self, model_path: str | None = None):
        self._llm = LLM(model_path, enable_lora=True, dtype="float32")
        self._published: str | None = None

    def publish(self, step: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name, old = f"policy-v{step}", self._published
        self._llm.load_lora_adapter_from_tensors(name, tensors, config)
        self._published = name
        if old is not None:
            self._llm.unload_lora_adapter(old)

    def sample(self, prompts: Sequence[list[int]], n: int, sampling_params: dict[str, Any]) -> list[list[Rollout]]:
        params = sampling_params | {"n": n}
        found = self._llm.generate(list(prompts), params, self._published, return_logprob=True)
        return [
            [
                Rollout(prompt, g.token_ids, g.logprobs, g.text, g.finish_reason.type == "stop")
                for g in found[i * n : (i + 1) * n]
            ]
            for i, prompt in enumerate(prompts)
        ]

    def loaded(self) -> dict[str, str]:
        """Name → path of the adapters that are loaded."""
        return self._llm.loaded_adapters()

    def close(self) -> None:
        self._llm.close()


class OverHttp:
    """A server, `multilora serve --enable-lora --dtype float32` for example, at `url`."""

    def __init__(self, url: str, api_key: str | None = None):
        self._url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._published: str | None = None

    def publish(self, step: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name, old = f"policy-v{step}", self._published
        weights = base64.b64encode(save(tensors)).decode()
        body = {"lora_name": name, "config_dict": config, "serialized_tensors": weights, "load_format": "safetensors"}
        self._post("/load_lora_adapter_from_tensors", body)
        self._published = name
        if old is not None:
            self._post("/unload_lora_adapter", {"lora_name": old})

    def sample(self, prompts: Sequence[list[int]], n: int, sampling_params: dict[str, Any]) -> list[list[Rollout]]:
        body = {
            "input_ids": list(prompts),
            "sampling_params": sampling_params | {"n": n},
            "lora_path": self._published,
            "return_logprob": True,
        }
        answers = self._post("/generate", body)
        return [
            [_rollout(prompt, answers[j * len(prompts) + i]) for j in range(n)] for i, prompt in enumerate(prompts)
        ]

    def loaded(self) -> dict[str, str]:
        """Name → root of the adapters that are loaded."""
        request = urllib.request.Request(f"{self._url}/v1/models", headers=self._headers)
        with urllib.request.urlopen(request) as answer:
            models = json.load(answer)["data"]
        return {model["id"]: model["root"] for model in models if model["parent"] is not None}

    def close(self) -> None:
        if self._published is not None:
            self._post("/unload_lora_adapter", {"lora_name": self._published})

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._url + route, json.dumps(body).encode(), self._headers)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            raise RuntimeError(f"{route}: HTTP {e.code}: {e.read().decode(errors='replace')}") from e


def _rollout(prompt: list[int], answer: dict[str, Any]) -> Rollout:
    meta = answer["meta_info"]
    logprobs = [logprob for logprob, _, _ in meta["output_token_logprobs"]]
    complete = meta["finish_reason"]["type"] == "stop"
    return Rollout(prompt, answer["output_ids"], logprobs, answer["text"], complete)
