"""Offline use: `LLM(model_path, lora_paths=…).generate(prompts, …)`, the whole engine in this process.

The front is the server's (tokenizer, text streams, adapter names); only HTTP is missing. Adapters are in
`adapters.py`, the forms that arguments take in `inputs.py`. Not thread-safe.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from multilora.adapters.sources.spool import Spool
from multilora.config import Config
from multilora.demo import base_model_path
from multilora.engine.build import build_engine
from multilora.engine.engine import Engine
from multilora.engine.messages import (
    Abort,
    AdapterInfo,
    Finish,
    Output,
    Outputs,
    Stats,
    Submit,
    TopLogprobs,
    UseTokenizer,
)
from multilora.engine.process.local import LocalEngine
from multilora.errors import BadRequest, from_wire
from multilora.front.adapter_spec import AdapterSpec, parse_composition, parse_specs
from multilora.front.grammar import GrammarCompiler
from multilora.front.prompt import check_prompt, engine_params
from multilora.front.registry import AdapterRegistry, Held
from multilora.front.stream import FinishReason, TextStream
from multilora.front.tokenizer import Tokenizer
from multilora.front.vocabulary import Vocabularies
from multilora.llm.adapters import LocalAdapters
from multilora.llm.inputs import Params, read_params, read_prompts, spread
from multilora.params import SamplingParams


@dataclass(frozen=True)
class Generation:
    """One answer. Logprobs are natural logarithms of the raw distribution, only when asked for."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[float | None] | None = None
    top_logprobs: list[TopLogprobs] | None = None
    input_logprobs: list[float | None] | None = None
    input_top_logprobs: list[TopLogprobs | None] | None = None


@dataclass
class _Job:
    message: Submit
    stream: TextStream
    held: Held


class LLM:
    """One base model and its adapters.

    Keyword arguments are the fields of `Config` (`dtype`, `max_loras_per_batch`, …); `lora_paths` takes
    {name: path}, or a list of any of the forms of --lora-paths. Raises ConfigError, ModelUnsupported, OutOfMemory,
    and AdapterError for an adapter that cannot be loaded.
    """

    def __init__(self, model_path: str | None = None, *, lora_paths: Any = None, **options: Any):
        self.config = Config.make(model_path=model_path, lora_paths=lora_paths, **options)
        config = self.config
        self._spool = Spool()
        self._engine = build_engine(self._spool.admit(config))
        self._local = LocalEngine(self._engine)
        try:
            self._ready = self._engine.ready()
            self.tokenizer: Tokenizer | None = None
            if not config.skip_tokenizer_init:
                path = config.tokenizer_path or config.model_path or str(base_model_path())
                self.tokenizer = Tokenizer.load(
                    path,
                    revision=config.revision,
                    trust_remote_code=config.trust_remote_code,
                    chat_template=config.chat_template,
                )
            self._grammars: GrammarCompiler | None = None
            self._registry = AdapterRegistry(config.model_name, config.enable_lora, config.max_loaded_loras)
            self._vocabularies = Vocabularies(self.tokenizer, self._ready, self._registry, config.lora_root)
            self._adapters = LocalAdapters(self._local, self._registry, self._vocabularies, self._spool)
            self._rids = itertools.count()
            for entry in config.lora_paths:
                self.load_lora_adapter(entry.lora_name, entry.lora_path, pinned=entry.pinned)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        sampling_params: Params | Sequence[Params] = None,
        lora_path: Any = None,
        *,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
    ) -> Any:
        """Complete one prompt (text or token ids) or a list of them, all in one batch.

        lora_path: an adapter's name or a composition, [{"name": …, "weight": …}, …], for all prompts, or a list with
        one per prompt; None is the base model.
        Returns a `Generation` for one prompt and `n` = 1, else a list: the prompts' answers in order, and with
        `n` > 1 prompt i's samples at [i·n, (i + 1)·n). Raises BadRequest before anything runs.
        """
        if top_logprobs_num < 0:
            raise BadRequest(f"top_logprobs_num must be 0 or more, is {top_logprobs_num}", param="top_logprobs_num")
        single, given = read_prompts(prompts)
        params = spread(sampling_params, len(given), "sampling_params")
        choices = parse_specs(lora_path, len(given))
        self._registry.check_request(choices)
        ids = [self._vocabularies.encode(*pair, "prompts")[0] for pair in zip(given, choices, strict=True)]
        wants = (return_logprob, logprob_start_len, top_logprobs_num)
        jobs: list[_Job] = []
        try:
            for prompt, raw, spec in zip(ids, params, choices, strict=True):
                jobs += self._jobs(prompt, read_params(raw), spec, wants)
            self._run(jobs)
        finally:
            for job in jobs:
                if job.stream.finished is None:
                    self._engine.handle(Abort(job.message.rid))
                self._registry.release(job.held)
        answers = [_generation(job.stream) for job in jobs]
        return answers[0] if single and len(answers) == 1 else answers

    def _jobs(
        self, prompt: list[int], params: SamplingParams, spec: AdapterSpec, wants: tuple[bool, int, int]
    ) -> list[_Job]:
        ready, vocabulary = self._ready, self._vocabularies.of(spec)
        check_prompt(prompt, ready.context_length, vocabulary.size)
        vocabulary.check_grammar(params)
        grammar = self._grammar(params)
        limits = (len(prompt), ready.context_length, vocabulary.size)
        jobs = []
        for sample in range(params.n):
            sampling = engine_params(params, *limits, sample=sample, ends=vocabulary.ends)
            stream = TextStream(vocabulary.tokenizer, params, prompt, ready.eos_token_ids)
            held = self._registry.acquire(spec)
            message = Submit(
                rid=str(next(self._rids)),
                input_ids=prompt,
                sampling=sampling,
                adapters=held.composition,
                return_logprob=wants[0],
                logprob_start_len=wants[1],
                top_logprobs_num=wants[2],
                grammar=grammar,
            )
            jobs.append(_Job(message, stream, held))
        return jobs

    def _run(self, jobs: list[_Job]) -> None:
        """Step the engine until every job has ended. Raises the first job's error, if one has."""
        by_rid = {job.message.rid: job for job in jobs}
        for job in jobs:
            self._engine.handle(job.message)
        unfinished = len(jobs)
        while unfinished:
            for output in self._outputs():
                stream = by_rid[output.rid].stream if output.rid in by_rid else None
                if stream is None or stream.finished is not None:
                    continue
                delta = stream.push(output)
                if delta.drop:
                    self._engine.handle(Finish(output.rid))
                unfinished -= delta.finished is not None
                if delta.finished is not None and delta.finished.type == "error":
                    raise from_wire(delta.finished.kind, delta.finished.message)

    def _outputs(self) -> list[Output]:
        """Of one step."""
        return [output for message in self._local.step() if isinstance(message, Outputs) for output in message.items]

    def _grammar(self, params: SamplingParams) -> str | None:
        if params.json_schema is None and params.regex is None and params.ebnf is None:
            return None
        tokenizer = self._vocabularies.base.reader("a grammar", "json_schema")
        if self._grammars is None:
            self._grammars = GrammarCompiler(tokenizer, self._ready.vocab_size)
            self._engine.handle(UseTokenizer(self._grammars.tokenizer_info_json()))
        return self._grammars.compile(params)

    # ------------------------------------------------------------------ adapters

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> AdapterInfo:
        """Load an adapter from a directory or the hub. Raises AdapterError; nothing has changed then."""
        return self._adapters.load(lora_name, lora_path, pinned)

    def load_lora_adapters(self, lora_paths: Mapping[str, str]) -> dict[str, AdapterInfo]:
        """Load several, name → path, side by side: faster than one after the other.

        Raises the first one's error when all have ended; those without an error are loaded then.
        """
        return self._adapters.load_several(lora_paths)

    def load_lora_adapter_from_tensors(
        self, lora_name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any], pinned: bool = False
    ) -> AdapterInfo:
        """Load an adapter from memory: tensors by their names in PEFT's file, and PEFT's config as a dict.

        The tensors are copied to a private file first. Raises AdapterError or BadRequest; nothing has changed then.
        """
        return self._adapters.load_from_tensors(lora_name, tensors, config, pinned)

    def compose_lora_adapters(self, lora_name: str, parts: Sequence[dict[str, Any]]) -> None:
        """Let a name stand for a composition of loaded adapters, each a {"name": …, "weight": …}."""
        self._registry.compose(lora_name, parse_composition(list(parts)))

    def unload_lora_adapter(self, lora_name: str) -> None:
        """Forget an adapter and free its memory, or forget a composition. Raises AdapterNotLoaded."""
        self._adapters.unload(lora_name)

    def loaded_adapters(self) -> dict[str, str]:
        """Name → path ("__tensor__": loaded from tensors)."""
        return self._registry.loaded()

    # ------------------------------------------------------------------ state and end

    @property
    def engine(self) -> Engine:
        """The engine underneath, for those who step it themselves."""
        return self._engine

    def set_lora_limits(self, *, lora_device_bytes: int | None, max_loras_per_batch: int | None) -> None:
        """Other limits from now on, None: none. Raises ConfigError if an adapter that is loaded could never run."""
        self._engine.set_lora_limits(lora_device_bytes, max_loras_per_batch)

    def stats(self) -> Stats:
        """Queues, pages, counters and where each adapter is now."""
        return self._engine.report.stats()

    def close(self) -> None:
        """End the loader process. The LLM is of no use afterwards."""
        self._engine.close()
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _generation(stream: TextStream) -> Generation:
    assert stream.finished is not None
    return Generation(
        text=stream.text,
        token_ids=stream.token_ids,
        finish_reason=stream.finished,
        prompt_tokens=stream.prompt_tokens,
        cached_tokens=stream.cached_tokens,
        logprobs=stream.logprobs,
        top_logprobs=stream.top_logprobs,
        input_logprobs=stream.input_logprobs,
        input_top_logprobs=stream.input_top_logprobs,
    )
