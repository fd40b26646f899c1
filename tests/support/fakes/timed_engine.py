"""An engine in which steps take time by a clock of its own, for tests of who starts when."""

from collections.abc import Callable
from typing import Any

from fakes.engine import FakeForward, FakeLaunched, make_engine, rids_of
from fakes.engine_driver import Stepper
from fakes.tiers import FakeFile, FakeTiers
from multilora.engine.messages import LoadAdapter, Output, Submit
from multilora.engine.plan import StepResult
from multilora.params import SamplingParams

IDLE = 0.0005  # seconds between two looks when there is nothing to run
TOKENS = 5  # of a prompt
SCHEDULING = ("max_running", "max_unfinished", "max_queued_tokens", "max_wait", "chunk_tokens", "policy", "weights")


class Timed(Stepper):
    """An engine in which a step takes `step(prompt tokens)` seconds; without tokens to compute, time passes slowly.

    Adapters are loaded from "/1", "/2", … into host memory. first: request → when its first token came, in seconds
    since `start`; order: requests by admission; sizes: prompts in each step that has one.
    """

    def __init__(self, step: Callable[[int], float], adapters: int = 0, *, ahead: bool = False, **options: Any):
        self.now = 0.0
        self.start = 0.0
        scheduling = {name: options.pop(name) for name in SCHEDULING if name in options}
        files = {f"/{i}": FakeFile() for i in range(1, adapters + 1)}
        self.tiers = FakeTiers(files, **({"total_pages": 256, "now": lambda: self.now} | options))
        self.engine = make_engine(
            self.tiers, clock=lambda: self.now, ahead=ahead, **({"max_running": 64, "chunk_tokens": 512} | scheduling)
        )
        self.first: dict[str, float] = {}
        self.order: list[str] = []
        self.sizes: list[int] = []
        self.tokens: dict[str, list[float]] = {}
        self._step = step
        self._sample = self.engine.runner.sample
        self.engine.runner.sample = self._sampled  # type: ignore[method-assign, assignment]
        for version in range(1, adapters + 1):
            self.engine.handle(LoadAdapter(call=version, version=version, path=f"/{version}"))
        self.run()

    def _sampled(self, forward: FakeForward) -> FakeLaunched:
        plan = forward.plan
        prompts = [(rid, c) for rid, c in zip(rids_of(self.engine, plan), plan.chunks, strict=True) if not c.decodes]
        self.order += [rid for rid, chunk in prompts if chunk.start == 0]
        if prompts:
            self.sizes.append(len(prompts))
        launched = self._sample(forward)

        def result() -> StepResult:
            self.now += self._step(sum(chunk.count for _, chunk in prompts))
            return launched.result()

        return FakeLaunched(plan, result)

    def submit(
        self, rid: str, adapter: int | None = None, tokens: int = 1, *, prompt: int = TOKENS, **fields: Any
    ) -> None:
        """prompt: how many tokens; fields: of `Submit`."""
        sampling = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        ids = [(len(self.first) + 3 * i) % 20 for i in range(prompt)]
        adapters = () if adapter is None else ((adapter, 1.0),)
        self.engine.handle(Submit(rid=rid, input_ids=ids, sampling=sampling, adapters=adapters, **fields))

    def take(self, output: Output) -> None:
        self.first.setdefault(output.rid, self.now - self.start)
        self.tokens.setdefault(output.rid, []).append(self.now)

    def after_step(self) -> None:
        if not self.engine.running:
            self.now += IDLE

    def check(self) -> None:
        self.tiers.check()

    def run(self, max_steps: int = 20_000) -> None:
        super().run(max_steps)

    def learn(self) -> None:
        """What steps and copies take. No adapter is on the device afterwards."""
        for adapter in (None, None, 1):
            self.submit("learn", adapter, tokens=2)
            self.run()
        self.tiers.device.evict(self.engine.scheduler.launched)
        self.first.clear()
        self.order.clear()
        self.sizes.clear()
        self.start = self.now
