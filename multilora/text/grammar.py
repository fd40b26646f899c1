"""Grammars for constrained decoding, compiled at the door. Called by the server and by `LLM`."""

from collections.abc import Sequence

from multilora.params import SamplingParams
from multilora.text.tokenizer import Tokenizer

ANY_JSON = "$$ANY$$"  # as json_schema: any JSON value


class GrammarCompiler:
    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int] | None = None):
        raise NotImplementedError

    def tokenizer_info_json(self) -> str:
        raise NotImplementedError

    def compile(self, params: SamplingParams) -> str | None:
        raise NotImplementedError
