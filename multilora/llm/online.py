"""Online use: `AsyncLLM(model_path, lora_paths=…)`, an engine in a process of its own behind async methods.

The front is the server's and so is its `AsyncDriver`; only HTTP is missing. All methods belong to one event loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from multilora.config import Config
from multilora.drivers.async_driver import AsyncDriver
from multilora.engine.messages import AdapterInfo, Stats
from multilora.engine.process.supervisor import EngineSupervisor
from multilora.errors import BadRequest, ConfigError
from multilora.front.front import Front
from multilora.front.generation import Job, Sample
from multilora.front.state_directory import open_state
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

if TYPE_CHECKING:
    import torch


class AsyncLLM:
    """One base model and its adapters. Use it as an async context manager, or call `start` and `close`.

    Arguments are those of `LLM`. `start` raises what making an `LLM` raises.
    """

    def __init__(self, model_path: str | None = None, *, lora_paths: Any = None, **options: Any):
        self.config = with_directory(Config.make(model_path=model_path, lora_paths=lora_paths, **options))
        if self.config.front_workers > 1:
            raise ConfigError("front_workers: an AsyncLLM serves no HTTP; the server does")
        self.tokenizer: Tokenizer | None = None
        self._records, self._spool = open_state(self.config.state_dir)
        self._driver: AsyncDriver | None = None

    async def start(self) -> None:
        """Start the engine process and load `lora_paths`."""
        if self._driver is not None:
            raise RuntimeError("this AsyncLLM has been started already")
        loading = asyncio.create_task(asyncio.to_thread(Tokenizer.of, self.config))
        try:
            engine = await EngineSupervisor.start(self._spool.admit(self.config))
        finally:
            await asyncio.gather(loading, return_exceptions=True)
        try:
            self.tokenizer = loading.result()
            front = Front(self.config, engine, self.tokenizer, self._spool, records=self._records)
            driver = AsyncDriver(engine, front)
            await driver.change(front.load_at_start())
        except BaseException:
            await engine.shutdown()
            self._close_state()
            raise
        self._driver = driver

    async def close(self) -> None:
        """Let the engine finish what runs, and end it. Nothing happens if it was never started."""
        if self._driver is not None:
            driver, self._driver = self._driver, None
            await driver.close()
        self._close_state()

    def _close_state(self) -> None:
        self._spool.close()
        self._records.close()

    # ------------------------------------------------------------------ generation

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: Params = None,
        lora_path: Any = None,
        *,
        request_id: str | None = None,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
    ) -> AsyncGenerator[Completion, None]:
        """Complete one prompt; yields all there is of the answer whenever there is more of it.

        The last one has `finished`. With `n` > 1 the samples come as they grow, told apart by `index`. lora_path: an
        adapter's name or a composition, [{"name": …, "weight": …}, …]; None is the base model.
        Ending the iteration early, or cancelling its task, aborts the request. Raises BadRequest before anything
        runs, and the typed error of a request that fails.
        """
        jobs, several = read_jobs(
            prompt,
            sampling_params,
            lora_path,
            return_logprob=return_logprob,
            logprob_start_len=logprob_start_len,
            top_logprobs_num=top_logprobs_num,
        )
        if several:
            raise BadRequest("prompt: one prompt for each generate(); begin several of them side by side")
        rids = None if request_id is None else [request_id]
        if rids and jobs[0].sampling.n > 1:
            rids = [f"{request_id}#{i}" for i in range(jobs[0].sampling.n)]
        held = await self._started.hold(names_of(jobs))
        try:
            generation = await self._started.generate(jobs, rids)
        finally:
            self._front.resolver.release(held)
        try:
            async for sample, _ in generation.events():
                yield Completion.of(sample)
        finally:
            generation.close()

    async def embed(
        self,
        prompts: Prompts,
        lora_path: Any = None,
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        pooling: str | None = None,
    ) -> Any:
        """The embedding of one prompt, or of a list of them: as `LLM.embed`. Cancelling its task aborts it."""
        options: dict[str, Any] = {"dimensions": dimensions, "normalize": normalize, "pooling": pooling}
        request = EmbeddingRequest.read(prompts, lora_path, self._started.engine.ready.embedding, **options)
        return request.answer(await self._read(request.jobs))

    async def classify(self, prompts: Prompts, lora_path: Any = None) -> Any:
        """What one prompt, or each of a list of them, is classified as: as `LLM.classify`."""
        jobs, several = classify_jobs(prompts, lora_path)
        settings = self._started.engine.ready.classifier
        found = [TextClassification.of(sample, settings) for sample in await self._read(jobs)]
        return found if several else found[0]

    async def score(
        self, text_1: str | Sequence[str], text_2: str | Sequence[str], lora_path: Any = None
    ) -> list[float]:
        """How well texts go together: as `LLM.score`."""
        steps = read_scoring(self._front, text_1, text_2, lora_path, ("text_1", "text_2"))
        scoring = await self._started.change(steps)
        return scoring.scores(await self._read(scoring.jobs), self._front)

    async def rerank(
        self, query: str, documents: Sequence[str], lora_path: Any = None, *, top_n: int | None = None
    ) -> list[RankedText]:
        """The documents by how well they answer the query, the best first: as `LLM.rerank`."""
        steps = read_scoring(self._front, query, documents, lora_path, ("query", "documents"))
        scoring = await self._started.change(steps)
        scores = scoring.scores(await self._read(scoring.jobs), self._front)
        return ranked(scores, scoring.pairs.second, top_n)

    async def _read(self, jobs: Sequence[Job]) -> list[Sample]:
        """All samples of jobs that are only read, in their order, ended. Cancelling aborts them."""
        held = await self._started.hold(names_of(jobs))
        try:
            generation = await self._started.generate(jobs)
        finally:
            self._front.resolver.release(held)
        return await generation.results()

    async def abort(self, request_id: str) -> None:
        """End a request: its last Completion says `abort`. One that is unknown or has ended is ignored."""
        self._front.abort(request_id)

    # ------------------------------------------------------------------ adapters

    async def load_lora_adapter(
        self,
        lora_name: str,
        lora_path: str,
        pinned: bool | None = None,
        *,
        replace: bool = False,
        weight_version: str | None = None,
        allow_update_mid_request: bool = False,
    ) -> AdapterInfo:
        """Load an adapter from a directory, the hub or a URL. Raises AdapterError; nothing has changed then.

        With `replace` it may take the place of a loaded one, and is pinned if that was and `pinned` is None; requests
        in flight finish on the old weights, or with `allow_update_mid_request` go on with the new ones from the next
        step on; their `weight_versions` say where.
        """
        options: dict[str, Any] = {"pinned": pinned, "replace": replace, "weight_version": weight_version}
        options["allow_update_mid_request"] = allow_update_mid_request
        load = self._front.adapters.load(lora_name, lora_path, any_url=True, **options)
        return await self._started.change(load)

    async def load_lora_adapters(self, lora_paths: Mapping[str, str]) -> dict[str, AdapterInfo]:
        """Load several, name → path, side by side: faster than one after the other.

        Raises the first one's error when all have ended; those without an error are loaded then.
        """
        infos = await self._started.change(self._front.adapters.load_many(read_lora_paths(lora_paths)))
        return dict(zip(lora_paths, infos, strict=True))

    async def load_lora_adapter_from_tensors(
        self,
        lora_name: str,
        tensors: "dict[str, torch.Tensor]",
        config: dict[str, Any],
        pinned: bool | None = None,
        *,
        replace: bool = False,
        weight_version: str | None = None,
        allow_update_mid_request: bool = False,
    ) -> AdapterInfo:
        """Load an adapter from memory: tensors by their names in PEFT's file, and PEFT's config as a dict.

        The tensors, which must not change meanwhile, are copied to a private file first. Raises AdapterError or
        BadRequest; nothing has changed then.
        """
        write = partial(write_tensors, tensors)
        options: dict[str, Any] = {"pinned": pinned, "replace": replace, "weight_version": weight_version}
        options["allow_update_mid_request"] = allow_update_mid_request
        load = self._front.adapters.load_tensors(lora_name, config, write, **options)
        return await self._started.change(load)

    async def compose_lora_adapters(
        self, lora_name: str, parts: Sequence[dict[str, Any]], *, replace: bool = False
    ) -> None:
        """Let a name stand for a composition of loaded adapters, each a {"name": …, "weight": …}."""
        await self._started.change(self._front.adapters.compose(lora_name, parts, replace=replace))

    async def unload_lora_adapter(self, lora_name: str) -> None:
        """Refuse new requests for the name, wait for those it has, and free it. Raises AdapterNotLoaded."""
        await self._started.change(self._front.adapters.unload(lora_name))

    # ------------------------------------------------------------------ pauses

    async def pause(self, mode: str = "abort", *, clear_cache: bool = True) -> None:
        """Generate nothing until `resume`; returns once the engine is at rest. Raises BadRequest.

        mode: requests that run freeze ("keep"), finish ("wait") or are aborted ("abort"), or freeze and are computed
        anew afterwards ("retract"). With "keep" and "retract" new requests wait, else they raise EnginePaused.
        clear_cache: drop the prefix cache, but not with "keep". Adapters can be loaded and unloaded meanwhile.
        """
        await self._started.change(self._front.pauses.pause(mode, clear_cache=clear_cache))

    async def resume(self) -> None:
        """End a pause. Raises BadRequest while the engine is asleep."""
        await self._started.change(self._front.pauses.resume())

    async def is_paused(self) -> bool:
        return self._front.pauses.paused

    async def sleep(self, level: int = 1, mode: str = "abort", tags: Sequence[str] | None = None) -> None:
        """Pause, and release the device's memory until `wake_up`; requests raise EngineAsleep meanwhile.

        level: 1 keeps the weights in host memory, 2 discards them and reads their files again, 0 releases nothing.
        tags: "weights" and "kv_cache", which holds resident adapters too; None: both. Adapters stay loaded.
        """
        await self._started.change(self._front.pauses.sleep(level, mode, tags))

    async def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """Take the memory back and, once nothing is missing, generate again. Returns whether the engine is awake.

        Raises OutOfMemory where the device lacks room; it can be called again.
        """
        return await self._started.change(self._front.pauses.wake_up(tags))

    async def is_sleeping(self) -> bool:
        return self._front.pauses.state.sleeping

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> None:
        """Empty the prefix cache; the flag has running requests computed anew, so that they hold none of it."""
        await self._started.change(self._front.pauses.flush(retract=reset_running_requests))

    def loaded_adapters(self) -> dict[str, str]:
        """Name → path ("__tensor__": loaded from tensors)."""
        return self._front.registry.loaded()

    # ------------------------------------------------------------------ state and end

    def stats(self) -> Stats:
        """Queues, pages, counters and where each adapter is, as the engine said last: at most a second ago."""
        return self._started.engine.stats

    @property
    def _started(self) -> AsyncDriver:
        if self._driver is None:
            raise RuntimeError("this AsyncLLM is not running: use `async with`, or await start()")
        return self._driver

    @property
    def _front(self) -> Front:
        return self._started.front

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
