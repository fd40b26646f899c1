"""Grammars compiled in the test's own process, on a thread: what stands for the pool of processes in most tests."""

import asyncio

from multilora.front.effects import CompiledText
from multilora.front.grammars.compiler import GrammarCompiler, Setup


class InProcessGrammars:
    """The shape of `multilora.drivers.grammar_pool.GrammarPool`, without its limits."""

    def __init__(self, seconds: float, nbytes: int):
        self._compiler: GrammarCompiler | None = None

    async def compile(self, setup: Setup, field: str, source: str) -> CompiledText:
        return await asyncio.to_thread(self._compile, setup, field, source)

    def _compile(self, setup: Setup, field: str, source: str) -> CompiledText:
        if self._compiler is None:
            self._compiler = GrammarCompiler(setup.tokenizer.hf, setup.vocab_size, setup.stop_token_ids)
        return CompiledText(self._compiler.compile(field, source), self._compiler.tokenizer_info)

    def close(self) -> None:
        """Nothing is left."""
