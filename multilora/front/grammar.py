"""Grammars for constrained decoding, compiled at the door so that a bad one is the client's error.

Owns the texts of the grammars that the engine is given, as many as fit a number of bytes. Compiling another one is an
effect, as it may take seconds and must be stoppable.
"""

from collections import OrderedDict
from collections.abc import Sequence

from multilora.errors import BadRequest
from multilora.front.access import CALLER
from multilora.front.effects import CompileGrammar, Steps
from multilora.front.engine_link import RequestLink
from multilora.front.grammars.compiler import Setup
from multilora.front.grammars.source import check_source
from multilora.front.vocabulary import Vocabulary
from multilora.params import SamplingParams

CACHE_BYTES = 64 << 20
Key = tuple[str, str, str]
"""The tenant, so that none can tell from the time what others have asked for; the field, and the grammar in it."""
MAX_DIFFERENT = 64
"""Grammars of one request that differ."""


class Grammars:
    """base: the base model's vocabulary; without a tokenizer nothing may be compiled."""

    def __init__(self, base: Vocabulary, engine: RequestLink):
        self._base = base
        self._engine = engine
        self._setup: Setup | None = None
        self._texts: OrderedDict[Key, str] = OrderedDict()  # oldest first
        self._bytes = 0
        self._tokenizer_sent = False  # to the engine

    def compile(self, params: Sequence[SamplingParams]) -> Steps[list[str | None]]:
        """The grammar of each as `Submit.grammar` wants it, None where there is none. Raises BadRequest."""
        found: dict[Key, str] = {}
        keys = [_key(p) for p in params]
        wanted = dict.fromkeys(key for key in keys if key is not None)
        if len(wanted) > MAX_DIFFERENT:
            raise BadRequest(f"{len(wanted)} different grammars in one request; at most {MAX_DIFFERENT} are served")
        for key in wanted:
            check_source(*key[1:])
        for key in wanted:
            found[key] = self._texts[key] if self._known(key) else (yield from self._compile(*key))
        return [None if key is None else found[key] for key in keys]

    def _known(self, key: Key) -> bool:
        if key not in self._texts:
            return False
        self._texts.move_to_end(key)
        return True

    def _compile(self, tenant: str, field: str, source: str) -> Steps[str]:
        tokenizer = self._base.reader("a grammar")
        if self._setup is None:
            ready = self._engine.ready
            self._setup = Setup(tokenizer, ready.vocab_size, ready.eos_token_ids)
        compiled = yield from CompileGrammar(self._setup, field, source)
        if not self._tokenizer_sent:
            self._tokenizer_sent = True
            self._engine.use_tokenizer(compiled.tokenizer_info)
        self._keep((tenant, field, source), compiled.text)
        return compiled.text

    def _keep(self, key: Key, text: str) -> None:
        if key in self._texts:  # two requests wanted it at once
            return
        self._texts[key] = text
        self._bytes += _size(key, text)
        while self._bytes > CACHE_BYTES:
            self._bytes -= _size(*self._texts.popitem(last=False))


def _key(params: SamplingParams) -> Key | None:
    field = params.grammar_field
    return None if field is None else (CALLER.get().tenant.name, field, getattr(params, field))


def _size(key: Key, text: str) -> int:
    return len(key[2]) + len(text)
