"""Fakes that are part of the product: tiny random models, small enough to build in a moment, and an engine's client
without an engine.

Used by this package's tests and by anyone who tests against it. Imports torch and transformers only when called.
"""

from __future__ import annotations

import asyncio
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from multilora.engine.messages import (
    AdapterInfo,
    AdapterSwitch,
    Finished,
    Logprobs,
    Output,
    PauseState,
    Ready,
    ReplaceAdapter,
    Reply,
    StartProfile,
    Stats,
    Submit,
    ToEngine,
    decode_to_engine,
    encode,
)
from multilora.errors import BadRequest, EngineDead, MultiloraError
from multilora.params import EmbeddingSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TINY_SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# family → (transformers' class prefix, what the family adds to TINY_SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}

QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}

# the same for mixtures of experts
EXPERT_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", QWEN_EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", QWEN_EXPERTS | {"head_dim": 32, "norm_topk_prob": True}),
}


def make_tiny_model(
    path: str | Path, family: str = "llama", *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> PreTrainedModel:
    """Write a random fp32 model of this family to directory `path`; returns transformers' own model, in eval mode.

    `overrides` are fields of the transformers config. Norm weights and biases are random too (transformers starts
    them at one and zero), and all weights are large enough that greedy choices are clear.
    """
    import torch
    import transformers

    prefix, extra = (FAMILIES | EXPERT_FAMILIES)[family]
    config = getattr(transformers, f"{prefix}Config")(**(TINY_SIZES | extra | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")(config)
        for name, weight in model.named_parameters():
            weight.data.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.2)
    model.eval()
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def make_adapter(
    path: str | Path,
    model_path: str | Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    prepare: Callable[[PreTrainedModel], None] | None = None,
    save: Mapping[str, Any] | None = None,
    **config: Any,
) -> PeftModel:
    """Write a random LoRA adapter for the model in `model_path` to directory `path`, saved by PEFT itself.

    `config` are the fields of PEFT's LoraConfig, `save` the arguments of its save_pretrained; `prepare` may change
    the base model before. Everything that PEFT would train is random, so the adapter changes the output. Returns
    PEFT's model with the adapter on it, in eval mode and fp32; `dtype` is what the file holds, and the returned
    weights have the values rounded to it.
    """
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about transformers' deprecations and unusual configs
        torch.manual_seed(seed)
        if prepare is not None:
            prepare(base)
        model = get_peft_model(base, LoraConfig(**config), autocast_adapter_dtype=False)
        train_randomly(model, dtype)
        model.save_pretrained(str(path), **(save or {}))
    model.float().eval()
    return model


def train_randomly(model: PeftModel, dtype: str = "float32") -> None:
    """Random numbers for lora_A and lora_B; everything else that PEFT would train changes a little. In place."""
    import torch

    for name, weight in model.named_parameters():
        if "lora_" not in name and not weight.requires_grad:
            continue
        noise = torch.randn_like(weight, dtype=torch.float32)
        factor = "lora_" in name and "magnitude" not in name
        value = noise.mul_(0.3) if factor else weight.detach() + noise.mul_(0.1)
        if dtype == "float32":
            weight.data.copy_(value)  # tied ones stay tied
        else:
            weight.data = value.to(getattr(torch, dtype))


class FakeEngineClient:
    """Stands where `engine.client.EngineClient` stands, without an engine: for tests of everything above it.

    Answers with `answer(submit)`, one token per Output (default: deterministic ids from prompt and adapter).
    `gate`: an asyncio.Event; while it is clear no token flows. `refuse`: error → ends that request instead of an
    answer; `load_errors`: path → error of `load_adapter`. What was asked of it is in the public lists.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 101,
        context_length: int = 256,
        eos_token_ids: tuple[int, ...] = (2,),
        answer: Callable[[Submit], list[int]] | None = None,
        refuse: Callable[[Submit], MultiloraError | None] = lambda submit: None,
    ):
        zero = {f.name: 0 for f in msgspec.structs.fields(Stats) if f.required and f.name != "adapters"}
        self.stats = Stats(**zero, adapters=[])
        self.ready = Ready(
            context_length=context_length,
            vocab_size=vocab_size,
            eos_token_ids=list(eos_token_ids),
            num_layers=1,
            dtype="float32",
            device="cpu",
            lora_backend="torch",
            attention_backend="torch",
            embedding=EmbeddingSettings(size=64),
            stats=self.stats,
        )
        self.alive = True
        self.restarting = False
        self.restarts = 0
        self.answer = answer or self._deterministic
        self.refuse = refuse
        self.gate = asyncio.Event()
        self.gate.set()
        self.load_errors: dict[str, MultiloraError] = {}
        self.not_composable_reason: dict[str, str] = {}  # path → why it cannot be composed
        self.tokens: dict[str, int] = {}  # path → rows of its own embeddings and head
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self.loaded: dict[int, str] = {}
        self.unloaded: list[int] = []
        self.flushes = 0
        self.calls: list[ToEngine] = []
        self.profile_root = Path(tempfile.gettempdir(), "profiles")
        self.profiles: list[StartProfile] = []
        self.profiling = False
        self.tokenizer_info: str | None = None
        self.delivered: dict[str, int] = {}  # rid → tokens so far
        self._running: dict[str, tuple[asyncio.Task[None], Callable[[Output], None]]] = {}

    def _deterministic(self, submit: Submit) -> list[int]:
        mix = sum(int(7 * version * weight) for version, weight in submit.adapters)
        start = sum(submit.input_ids) + mix + (submit.sampling.sampling_seed or 0)
        limit = submit.sampling.max_new_tokens
        count = limit if limit is not None else 8
        return [3 + (start + i) % (self.ready.vocab_size - 3) for i in range(count)]

    def submit(self, message: Submit, deliver: Callable[[Output], None]) -> None:
        assert message.rid not in self._running, f"rid {message.rid} is in use"
        assert message.grammar is None or self.tokenizer_info is not None
        self.submitted.append(message)
        self.delivered[message.rid] = 0
        assert decode_to_engine(encode(message)) == message  # it can travel
        error = self.refuse(message) if self.alive else EngineDead("the engine process ended")
        if error is not None:
            failed = Finished(type="error", kind=error.kind, message=error.message)
            deliver(Output(rid=message.rid, finished=failed))
            return
        self._running[message.rid] = (asyncio.create_task(self._run(message, deliver)), deliver)

    async def _run(self, message: Submit, deliver: Callable[[Output], None]) -> None:
        sampling, prompt = message.sampling, message.input_ids
        limit = (
            len(prompt) + len(self.answer(message)) if sampling.max_new_tokens is None else sampling.max_new_tokens
        )
        limit = min(limit, self.ready.context_length - len(prompt))
        stops = set(sampling.stop_token_ids or ())
        if not sampling.ignore_eos:
            stops |= set(self.ready.eos_token_ids)
        answer = self.answer(message)[:limit] if message.pooling is None else []
        if not answer:
            await self.gate.wait()
            deliver(self._output(message, [], 0, Finished(type="length")))
            del self._running[message.rid]
            return
        for i, token in enumerate(answer):
            await asyncio.sleep(0)
            await self.gate.wait()
            finished = Finished(type="length") if i + 1 == len(answer) else None
            if token in stops:
                finished = Finished(type="stop", matched=token)
            self.delivered[message.rid] += 1
            deliver(self._output(message, [token], i, finished))
            if finished:
                break
        del self._running[message.rid]

    def _output(self, message: Submit, tokens: list[int], index: int, finished: Finished | None) -> Output:
        fields: dict[str, Any] = {}
        top = [(-0.5, 3), (-1.5, 4), (-2.5, 5)][: message.top_logprobs_num]
        if message.prompt_logprobs is not None and index == 0:
            best = [(-0.5, 3), (-1.5, 4), (-2.5, 5)][: message.prompt_logprobs]
            of_prompt = [Logprobs(-0.25 - p, best, 7 + p) if p else None for p in range(len(message.input_ids))]
            fields["input_logprobs"] = of_prompt
        if message.return_logprob:
            fields["logprobs"] = [Logprobs(-0.5, top)] * len(tokens)
            if message.prompt_logprobs is None and index == 0 and message.logprob_start_len >= 0:
                positions = range(message.logprob_start_len, len(message.input_ids))
                fields["input_logprobs"] = [Logprobs(-0.25, top) if p else None for p in positions]
        return Output(
            rid=message.rid,
            token_ids=tokens,
            finished=finished,
            prompt_tokens=len(message.input_ids),
            cached_tokens=1,
            queue_seconds=0.01,
            pooled=b"" if message.pooling is None else self.pooled(message),
            **fields,
        )

    def pooled(self, message: Submit) -> bytes:
        """What it makes of a prompt: as many numbers as an embedding has, from the prompt's tokens alone."""
        numbers = [float((sum(message.input_ids) * (i + 1)) % 7 - 3) for i in range(self.ready.embedding.size)]
        return struct.pack(f"<{len(numbers)}f", *numbers)

    def _end(self, rid: str, finished: Finished | None) -> None:
        if rid in self._running:
            task, deliver = self._running.pop(rid)
            task.cancel()
            if finished is not None:
                deliver(Output(rid=rid, finished=finished))

    def abort(self, rid: str, message: str = "aborted") -> None:
        self.aborted.append(rid)
        self._end(rid, Finished(type="abort", message=message))

    def finish(self, rid: str) -> None:
        self.finished.append(rid)
        self._end(rid, None)

    def use_tokenizer(self, info: str) -> None:
        self.tokenizer_info = info

    def die(self) -> None:
        """The engine process ends: every request gets its error."""
        self.alive = False
        for rid in list(self._running):
            self._end(rid, Finished(type="error", kind="EngineDead", message="the engine process ended"))

    async def load_adapter(self, version: int, path: str, pinned: bool) -> AdapterInfo:
        await asyncio.sleep(0)
        if not self.alive:
            raise EngineDead("the engine process ended")
        if path in self.load_errors:
            raise self.load_errors[path]
        self.loaded[version] = path
        return AdapterInfo(
            version=version,
            path=path,
            rank=8,
            target_modules=["q_proj"],
            nbytes=1024,
            pages=1,
            not_composable_reason=self.not_composable_reason.get(path, ""),
            vocab_size=self.tokens.get(path),
            trains_tokens=path in self.tokens,
        )

    async def unload_adapter(self, version: int) -> None:
        await asyncio.sleep(0)
        del self.loaded[version]
        self.unloaded.append(version)

    async def flush_cache(self) -> None:
        self.flushes += 1

    async def call(self, message: Callable[[int], ToEngine]) -> Reply:
        """Notes the message, and answers that the engine is neither paused nor asleep. Requests on an adapter that is
        replaced change at once."""
        self.calls.append(made := message(0))
        if isinstance(made, ReplaceAdapter):
            for submit in self.submitted:
                if submit.rid in self._running and made.version in dict(submit.adapters):
                    switch = AdapterSwitch(self.delivered[submit.rid], made.version, made.successor)
                    self._running[submit.rid][1](Output(rid=submit.rid, switch=switch))
        return Reply(call=0, pause=PauseState())

    async def start_profile(self, wanted: StartProfile) -> None:
        assert decode_to_engine(encode(wanted)) == wanted
        if self.profiling:
            raise BadRequest("a profile is running already; stop it first")
        self.profiling = True
        self.profiles.append(wanted)

    async def stop_profile(self) -> None:
        if not self.profiling:
            raise BadRequest("no profile is running")
        self.profiling = False

    async def shutdown(self, timeout: float = 60.0) -> None:
        self.alive = False

    def end(self, why: str) -> None:
        self.die()
