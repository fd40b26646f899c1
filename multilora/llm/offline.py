"""Offline use: `LLM(model_path, lora_paths=…).generate(prompts, …)`, the whole engine in this process.

The front is the server's; a `SteppingDriver` performs what it asks for. Not thread-safe.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from multilora.adapters.sources.spool import Spool
from multilora.config import Config
from multilora.drivers.stepping import SteppingDriver
from multilora.engine.build import build_engine
from multilora.engine.engine import Engine
from multilora.engine.messages import AdapterInfo, Output, Stats
from multilora.engine.process.local import LocalEngine
from multilora.errors import ConfigError
from multilora.front.front import Front
from multilora.front.generation import Job, Sample
from multilora.front.tokenizer import Tokenizer
from multilora.llm.classification import TextClassification
from multilora.llm.completion import Completion
from multilora.llm.inputs import (
    EmbeddingRequest,
    Params,
    Prompts,
    classify_jobs,
    names_of,
    read_jobs,
    read_lora_paths,
    write_tensors,
)
from multilora.llm.scoring import RankedText, ranked, read_scoring
from multilora.models.gguf import with_directory
from multilora.planner.planner import ServingPlan, Workload, plan

if TYPE_CHECKING:
    import torch


class LLM:
    """One base model and its adapters.

    Keyword arguments are the fields of `Config` (`dtype`, `max_loras_per_batch`, …); `lora_paths` takes
    {name: path}, or a list of any of the forms of --lora-paths. Raises ConfigError, ModelUnsupported, OutOfMemory,
    and AdapterError for an adapter that cannot be loaded.
    """

    def __init__(self, model_path: str | None = None, *, lora_paths: Any = None, **options: Any):
        config = Config.make(model_path=model_path, lora_paths=lora_paths, **options)
        if config.state_dir is not None:
            raise ConfigError("state_dir: an LLM keeps nothing; AsyncLLM and the server do")
        if config.front_workers > 1:
            raise ConfigError("front_workers: an LLM serves no HTTP; the server does")
        self.config = with_directory(config)
        self._spool = Spool()
        self._local = LocalEngine(build_engine(self._spool.admit(self.config)))
        try:
            self.tokenizer = Tokenizer.of(self.config)
            self._front = Front(self.config, self._local, self.tokenizer, self._spool)
            self._driver = SteppingDriver(self._local, self._front.registry)
            self._driver.run(self._front.adapters.load_many(self.config.lora_paths, all_or_none=True))
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: Prompts,
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
        Returns a `Completion` for one prompt and `n` = 1, else a list: the prompts' answers in order, and with
        `n` > 1 prompt i's samples at [i·n, (i + 1)·n). Raises BadRequest before anything runs.
        """
        jobs, several = read_jobs(
            prompts,
            sampling_params,
            lora_path,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
        )
        answers = [Completion.of(sample) for sample in self._run(jobs)]
        return answers if several or len(answers) > 1 else answers[0]

    def embed(
        self,
        prompts: Prompts,
        lora_path: Any = None,
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        pooling: str | None = None,
    ) -> Any:
        """The embedding of one prompt (text or token ids), or of a list of them, all in one batch.

        lora_path: as in `generate`. dimensions: only so many of the first numbers, as Matryoshka embeddings are cut.
        normalize: scale to length 1; pooling: "last", "mean" or "cls"; None: as the model's own files say.
        Returns a `TextEmbedding`, or a list of them in the prompts' order. Raises BadRequest before anything runs.
        """
        options: dict[str, Any] = {"dimensions": dimensions, "normalize": normalize, "pooling": pooling}
        request = EmbeddingRequest.read(prompts, lora_path, self._local.ready.embedding, **options)
        return request.answer(self._run(request.jobs))

    def classify(self, prompts: Prompts, lora_path: Any = None) -> Any:
        """What one prompt (text or token ids), or each of a list of them, is classified as, all in one batch.

        lora_path: as in `generate`. An adapter with a classification head of its own (PEFT's SEQ_CLS) classifies by
        that, on any base model; else the base model must have one. Returns a `TextClassification`, or a list of them.
        Raises BadRequest before anything runs.
        """
        jobs, several = classify_jobs(prompts, lora_path)
        settings = self._local.ready.classifier
        found = [TextClassification.of(sample, settings) for sample in self._run(jobs)]
        return found if several else found[0]

    def score(self, text_1: str | Sequence[str], text_2: str | Sequence[str], lora_path: Any = None) -> list[float]:
        """How well texts go together: one with each of a list, or each with that in the same place of the other list.

        By a classification head with one label, of the adapter or the base model, as a probability; without one by
        the cosine of their embeddings. Raises BadRequest before anything runs.
        """
        scoring = self._driver.run(read_scoring(self._front, text_1, text_2, lora_path, ("text_1", "text_2")))
        return scoring.scores(self._run(scoring.jobs), self._front)

    def rerank(
        self, query: str, documents: Sequence[str], lora_path: Any = None, *, top_n: int | None = None
    ) -> list[RankedText]:
        """The documents by how well they answer the query, the best first: `score`, sorted."""
        scoring = self._driver.run(read_scoring(self._front, query, documents, lora_path, ("query", "documents")))
        scores = scoring.scores(self._run(scoring.jobs), self._front)
        return ranked(scores, scoring.pairs.second, top_n)

    def _run(self, jobs: Sequence[Job]) -> list[Sample]:
        """All samples of the jobs, in their order, ended."""
        outputs: deque[Output] = deque()
        resolver = self._front.resolver
        held = self._driver.run(resolver.hold(names_of(jobs)))
        try:
            generation = self._driver.run(self._front.submit(jobs, outputs.append))
        finally:
            resolver.release(held)
        try:
            while not generation.finished:
                self._local.step()
                while outputs:
                    generation.receive(outputs.popleft())
        finally:
            generation.close()
        return generation.samples

    # ------------------------------------------------------------------ adapters

    def load_lora_adapter(
        self,
        lora_name: str,
        lora_path: str,
        pinned: bool | None = None,
        *,
        replace: bool = False,
        weight_version: str | None = None,
    ) -> AdapterInfo:
        """Load an adapter from a directory, the hub or a URL. Raises AdapterError; nothing has changed then.

        With `replace` it may take the place of a loaded one, and is pinned if that was and `pinned` is None.
        """
        options: dict[str, Any] = {"pinned": pinned, "replace": replace, "weight_version": weight_version}
        return self._driver.run(self._front.adapters.load(lora_name, lora_path, any_url=True, **options))

    def load_lora_adapters(self, lora_paths: Mapping[str, str]) -> dict[str, AdapterInfo]:
        """Load several, name → path, side by side: faster than one after the other.

        Raises the first one's error when all have ended; those without an error are loaded then.
        """
        infos = self._driver.run(self._front.adapters.load_many(read_lora_paths(lora_paths)))
        return dict(zip(lora_paths, infos, strict=True))

    def load_lora_adapter_from_tensors(
        self,
        lora_name: str,
        tensors: "dict[str, torch.Tensor]",
        config: dict[str, Any],
        pinned: bool | None = None,
        *,
        replace: bool = False,
        weight_version: str | None = None,
    ) -> AdapterInfo:
        """Load an adapter from memory: tensors by their names in PEFT's file, and PEFT's config as a dict.

        The tensors are copied to a private file first. Raises AdapterError or BadRequest; nothing has changed then.
        """
        write = partial(write_tensors, tensors)
        options: dict[str, Any] = {"pinned": pinned, "replace": replace, "weight_version": weight_version}
        return self._driver.run(self._front.adapters.load_tensors(lora_name, config, write, **options))

    def compose_lora_adapters(
        self, lora_name: str, parts: Sequence[dict[str, Any]], *, replace: bool = False
    ) -> None:
        """Let a name stand for a composition of loaded adapters, each a {"name": …, "weight": …}."""
        self._driver.run(self._front.adapters.compose(lora_name, parts, replace=replace))

    def unload_lora_adapter(self, lora_name: str) -> None:
        """Forget an adapter and free its memory, or forget a composition. Raises AdapterNotLoaded."""
        self._driver.run(self._front.adapters.unload(lora_name))

    def loaded_adapters(self) -> dict[str, str]:
        """Name → path ("__tensor__": loaded from tensors)."""
        return self._front.registry.loaded()

    # ------------------------------------------------------------------ pauses

    def pause(self) -> None:
        """Let `generate` raise EnginePaused until `resume`. Adapters can be loaded and unloaded meanwhile."""
        self._driver.run(self._front.pauses.pause("wait"))

    def resume(self) -> None:
        """End a pause. Raises BadRequest while the engine is asleep."""
        self._driver.run(self._front.pauses.resume())

    def is_paused(self) -> bool:
        return self._front.pauses.paused

    def sleep(self, level: int = 1, tags: Sequence[str] | None = None) -> None:
        """Release the device's memory until `wake_up`; `generate` raises EngineAsleep meanwhile.

        level: 1 keeps the weights in host memory, 2 discards them and reads their files again, 0 releases nothing.
        tags: "weights" and "kv_cache", which holds resident adapters too; None: both. Adapters stay loaded.
        """
        self._driver.run(self._front.pauses.sleep(level, "wait", tags))

    def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """Take the memory back. Returns whether nothing is missing, and `generate` works again.

        Raises OutOfMemory where the device lacks room; it can be called again.
        """
        return self._driver.run(self._front.pauses.wake_up(tags))

    def is_sleeping(self) -> bool:
        return self._front.pauses.state.sleeping

    # ------------------------------------------------------------------ before there is a GPU

    @staticmethod
    def plan(model_path: str, **question: Any) -> ServingPlan:
        """What a GPU would serve of a workload: adapters that fit, tokens a second, first tokens, where it breaks.

        question: the fields of `planner.planner.Workload`, such as gpu, adapters, rank, rps, prompt and answer. Needs
        no GPU, and reads the model's config only. Raises ConfigError, ModelUnsupported, and OutOfMemory if the model
        does not fit.
        """
        return plan(Workload(model_path, **question))

    # ------------------------------------------------------------------ state and end

    @property
    def engine(self) -> Engine:
        """The engine underneath, for callers that step it themselves."""
        return self._local.engine

    def set_lora_limits(self, *, lora_device_bytes: int | None, max_loras_per_batch: int | None) -> None:
        """Other limits from now on, None: none. Raises ConfigError if an adapter that is loaded could never run."""
        self.engine.set_lora_limits(lora_device_bytes, max_loras_per_batch)

    def stats(self) -> Stats:
        """Queues, pages, counters and where each adapter is now."""
        return self._local.stats

    def close(self) -> None:
        """End the loader process. The LLM is of no use afterwards."""
        self.engine.close()
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
