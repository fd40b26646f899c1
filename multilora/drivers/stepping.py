"""Drives the front by stepping an engine in the same process: for `LLM`.

`run` steps the engine until its work is done. Blocking work runs at once, as nobody else waits; several pieces of
work (`Gather`, `Spawn`) advance whenever a step brings what they wait for.
"""

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from multilora.engine.messages import Reply
from multilora.engine.process.local import LocalEngine
from multilora.errors import MultiloraError, from_wire
from multilora.front.effects import (
    CarryThrough,
    CompiledText,
    CompileGrammar,
    Effect,
    EngineCall,
    EngineLoad,
    EngineUnload,
    Gather,
    RunBlocking,
    Spawn,
    Steps,
    WaitUntilDone,
    WaitUntilIdle,
    Within,
)
from multilora.front.grammars.compiler import GrammarCompiler, Setup
from multilora.front.registry import AdapterRegistry

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SteppingDriver:
    """Drives one engine, and the registry whose versions it holds, by stepping. Not thread-safe."""

    def __init__(self, engine: LocalEngine, registry: AdapterRegistry):
        self._engine = engine
        self._registry = registry
        self._compiler: GrammarCompiler | None = None

    def run(self, steps: Steps[T]) -> T:
        """The result of `steps`, or its error."""
        task = _Task(steps, self)
        task.advance()
        try:
            while not task.done or self._engine.calling:  # what it has spawned asks the engine too
                self._engine.step()
        except BaseException as e:  # of the engine, or an interrupt: the work must clean up
            self._engine.forget_calls()
            task.interrupt(e)
            raise
        return task.result()

    def _compile(self, setup: Setup, field: str, source: str) -> CompiledText:
        if self._compiler is None:
            self._compiler = GrammarCompiler(setup.tokenizer.hf, setup.vocab_size, setup.stop_token_ids)
        return CompiledText(self._compiler.compile(field, source), self._compiler.tokenizer_info)

    def perform(self, effect: Effect[Any], task: "_Task[Any]") -> None:
        """Have the task advance with the effect's result, now or in a later step."""
        match effect:
            case RunBlocking(function=function):
                task.advance(*_outcome(function))
            case CompileGrammar(setup, field, source):
                task.advance(*_outcome(partial(self._compile, setup, field, source)))
            case EngineLoad(version, path, pinned):
                self._engine.load_adapter(version, path, pinned, partial(_take_reply, task))
            case EngineUnload(version):
                self._engine.unload_adapter(version, partial(_take_reply, task))
            case EngineCall(message):
                self._engine.begin_call(message, partial(_take_reply, task, whole=True))
            case WaitUntilIdle(version):
                self._registry.when_idle(version, task.advance)
            case WaitUntilDone(flight):  # which has a deadline of its own
                flight.when_done(task.advance)
            case Within(steps) | CarryThrough(steps):  # nobody else waits, and nothing is cancelled
                _Task(steps, self, lambda child: task.advance(*_outcome(child.result))).advance()
            case Spawn(steps):
                _Task(steps, self, _log_error).advance()
                task.advance()
            case Gather(children, limit):
                task.group = _Group([_Task(child, self) for child in children], limit, task)
                task.group.start()
            case other:
                raise AssertionError(f"not an effect: {other!r:.100}")


class _Task(Generic[T]):
    """Work under way. `on_done`: called once, with the task, at its end."""

    def __init__(
        self, steps: Steps[T], driver: SteppingDriver, on_done: "Callable[[_Task[T]], None]" = lambda _task: None
    ):
        self.done = False
        self.on_done = on_done
        self.group: _Group | None = None  # the last that it waited for
        self._steps = steps
        self._driver = driver
        self._outcome: Any = None
        self._results: deque[tuple[Any, BaseException | None]] = deque()  # of effects, not yet taken
        self._advancing = False

    def advance(self, value: Any = None, error: BaseException | None = None) -> None:
        """Go on with the result of the last effect. Effects that are done at once do not deepen the stack."""
        self._results.append((value, error))
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._results and not self.done:
                effect = self._next(*self._results.popleft())
                if effect is not None:
                    self._driver.perform(effect, self)
        finally:
            self._advancing = False

    def interrupt(self, error: BaseException) -> None:
        """Raise `error` where the work waits; what it still asks of the engine is not waited for."""
        if self.group is not None:
            self.group.interrupt(error)
        self.advance(None, error)

    def result(self) -> T:
        found = self.outcome()
        if isinstance(found, BaseException):
            raise found
        return found

    def outcome(self) -> T | BaseException:
        """Once done."""
        assert self.done
        found: T | BaseException = self._outcome
        return found

    def _next(self, value: Any, error: BaseException | None) -> Effect[Any] | None:
        try:
            return self._steps.throw(error) if error is not None else self._steps.send(value)
        except StopIteration as stop:
            self._outcome = stop.value
        except BaseException as e:  # noqa: BLE001 - kept for who awaits it
            self._outcome = e
        self.done = True
        self.on_done(self)
        return None


class _Group:
    """Tasks side by side, at most `limit` at a time; `parent` advances when all have ended."""

    def __init__(self, tasks: "list[_Task[Any]]", limit: int, parent: "_Task[Any]"):
        self._tasks = tasks
        self._waiting = deque(tasks)
        self._limit = limit
        self._parent = parent
        self._unfinished = len(tasks)
        self._starting = False
        for task in tasks:
            task.on_done = self._on_done

    def start(self) -> None:
        """Begin as many as may run; called again whenever one has ended."""
        if self._starting:
            return
        self._starting = True
        while self._waiting and self._unfinished - len(self._waiting) < self._limit:
            self._waiting.popleft().advance()
        self._starting = False
        if not self._unfinished:
            self._parent.advance([task.outcome() for task in self._tasks])

    def interrupt(self, error: BaseException) -> None:
        self._starting = True  # nothing more
        for task in self._tasks:
            if not task.done:
                task.interrupt(error)

    def _on_done(self, task: "_Task[Any]") -> None:  # noqa: ARG002 - part of the contract
        self._unfinished -= 1
        self.start()


def _outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return function(), None
    except BaseException as e:  # noqa: BLE001 - kept for who awaits it
        return None, e


def _take_reply(task: "_Task[Any]", reply: Reply, *, whole: bool = False) -> None:
    """whole: the result is the reply itself, not what it says of an adapter."""
    if reply.ok:
        task.advance(reply if whole else reply.info)
    else:
        task.advance(None, from_wire(reply.kind, reply.message))


def _log_error(task: "_Task[Any]") -> None:
    """For work that nobody waits for."""
    error = task.outcome()
    if isinstance(error, MultiloraError):
        logger.info("adapter change failed: %s", error)
    elif isinstance(error, BaseException):
        logger.error("adapter change failed", exc_info=error)
