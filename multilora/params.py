"""Sampling parameters: names and defaults are those of SGLang's native API; they are checked once, on arrival.

`SamplingParams.parse` turns a client's JSON object into the frozen struct and raises `BadRequest` naming the
field and the value. The struct travels to the engine as it is.
"""

import reprlib
from typing import Any, Literal, get_args, get_type_hints

import msgspec

from multilora.errors import BadRequest

MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 4096

Composition = tuple[tuple[int, float], ...]
"""The adapters that act on a request, as (version, weight): () is the base model, ((v, 1.0),) is version v alone."""


LogprobsMode = Literal["raw", "processed"]
LOGPROBS_MODES: dict[str, LogprobsMode] = {
    "raw": "raw",
    "processed": "processed",
    "raw_logprobs": "raw",
    "processed_logprobs": "processed",
}
"""What logprobs of an answer are the log-softmax of, by our names and by vLLM's. raw: the model's logits. processed:
what the token was drawn from, that is after penalties, bias, grammar, temperature, top-k, top-p and min-p."""

PoolingMethod = Literal["last", "mean", "cls"]
"""Which of a prompt's hidden rows become the one row that is returned: the last token's, the mean of all, the first
token's."""
POOLING_METHODS: tuple[PoolingMethod, ...] = get_args(PoolingMethod)


class PoolingParams(msgspec.Struct, frozen=True, array_like=True):
    """What is wanted of a prompt in place of an answer: a row of numbers from its hidden rows.

    The rows are those after the final norm, of `method`; with `scores` the row goes through a classification head:
    the adapter's own if it has one, else the base model's.
    """

    method: PoolingMethod = "last"
    scores: bool = False


class EmbeddingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the model's embeddings are made unless a request says otherwise.

    size: numbers in one. normalize: whether they are scaled to length 1.
    """

    size: int
    method: PoolingMethod = "last"
    normalize: bool = True


class ClassifierSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The base model's classification head: the name of each label, and the problem that it was trained for, as
    transformers' config has it: single_label_classification, multi_label_classification, regression; "": it does not
    say."""

    labels: tuple[str, ...]
    problem_type: str = ""


GrammarField = Literal["json_schema", "regex", "ebnf", "structural_tag"]
GRAMMAR_FIELDS: tuple[GrammarField, ...] = get_args(GrammarField)


def parse_logprobs_mode(value: Any, param: str = "logprobs_mode") -> LogprobsMode | None:
    """None for null. Raises BadRequest naming field and value."""
    if value is None:
        return None
    mode = LOGPROBS_MODES.get(value) if isinstance(value, str) else None
    if mode is None:
        logits = value in ("raw_logits", "processed_logits")
        reason = "logits are not returned, only logprobs; must be" if logits else "must be"
        raise BadRequest(f"{param} = {value!r:.100}: {reason} one of {', '.join(LOGPROBS_MODES)}", param=param)
    return mode


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """How the next token of one request is chosen, and when the request ends.

    The operations on the logits come in this order: repetition, frequency and presence penalties; logit bias; grammar
    mask and `min_new_tokens`; temperature; then top-k, top-p and min-p, together, on the tempered distribution.
    `temperature == 0` means greedy. `sampling_seed` fixes the random stream: token i of the answer depends on the
    uniform number of (seed, i) and on no other.
    """

    max_new_tokens: int | None = 128  # None: up to the context
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: all; `parse` takes 0 for it, too
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[str, float] | None = None  # token id (as text, as JSON wants it) → added to its logit
    sampling_seed: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None  # xgrammar's format, as JSON, or SGLang's older one

    @classmethod
    def parse(cls, data: Any) -> "SamplingParams":
        """The parameters in a JSON object, checked. Raises BadRequest naming field and value."""
        if data is None:
            return cls()
        if not isinstance(data, dict):
            raise BadRequest(f"sampling_params must be an object, not {type(data).__name__}", param="sampling_params")
        fields = {}
        for name, value in data.items():
            hint = _HINTS.get(name)
            if hint is None:
                raise BadRequest(f"sampling_params: unknown parameter {name!r}", param=name)
            try:
                fields[name] = msgspec.convert(_integral(value, hint), hint)
            except msgspec.ValidationError as e:
                raise BadRequest(f"sampling_params.{name}: {_SHORT.repr(value)}: {e}", param=name) from None
        if fields.get("top_k") == 0:
            fields["top_k"] = -1
        for name in GRAMMAR_FIELDS:
            if fields.get(name) == "":
                del fields[name]
        params = cls(**fields)
        params.check()
        return params

    def check(self) -> None:
        """Check ranges. Raises BadRequest naming field and value."""
        for name, ok, rule in self._rules():
            if not ok:
                given = _SHORT.repr(getattr(self, name))
                raise BadRequest(f"sampling_params.{name} = {given}: must be {rule}", param=name)
        grammars = [name for name in GRAMMAR_FIELDS if getattr(self, name) is not None]
        if len(grammars) > 1:
            message = f"an answer can follow only one grammar, but {grammars[0]} and {grammars[1]} are both given"
            raise BadRequest(message, param=grammars[1])

    def _rules(self) -> list[tuple[str, bool, str]]:
        n_max, n_min = self.max_new_tokens, self.min_new_tokens
        bias = self.logit_bias or {}
        ids = self.stop_token_ids or ()
        stops = self.stop_strings + self.stop_regexes
        return [
            ("max_new_tokens", n_max is None or n_max >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature <= 1000, "between 0 and 1000"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("top_k", self.top_k == -1 or 1 <= self.top_k < 2**31, "-1 or 0 (all), or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 2, "between 0.01 and 2"),
            (
                "min_new_tokens",
                n_min >= 0 and (n_max is None or n_min <= n_max),
                "between 0 and max_new_tokens",
            ),
            ("n", 1 <= self.n <= 256, "between 1 and 256"),
            ("stop", all(s for s in stops), "non-empty strings"),
            (
                "stop_token_ids",
                len(ids) <= MAX_STOP_TOKEN_IDS and all(t >= 0 for t in ids),
                f"at most {MAX_STOP_TOKEN_IDS} token ids, 0 or more",
            ),
            (
                "logit_bias",
                len(bias) <= MAX_LOGIT_BIAS
                and all(k.isascii() and k.isdecimal() and len(k) < 20 and abs(v) <= 1e6 for k, v in bias.items()),
                f"at most {MAX_LOGIT_BIAS} token ids → numbers between -1e6 and 1e6",
            ),
            (
                "sampling_seed",
                self.sampling_seed is None or abs(self.sampling_seed) < 2**63,
                "a 64-bit integer",
            ),
        ]

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def stop_regexes(self) -> list[str]:
        """`stop_regex` as a list."""
        return [self.stop_regex] if isinstance(self.stop_regex, str) else list(self.stop_regex or ())

    @property
    def grammar_field(self) -> GrammarField | None:
        """Which field holds the grammar that the answer has to follow; None: it is free."""
        return next((name for name in GRAMMAR_FIELDS if getattr(self, name) is not None), None)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        return self.temperature == 0.0 or self.top_k == 1


def _integral(value: Any, hint: Any) -> Any:
    """JSON has one kind of number: where integers are expected, 16.0 is 16."""
    if hint in _INTEGERS and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in _INTEGER_LISTS and isinstance(value, list):
        return [_integral(item, int) for item in value]
    return value


_SHORT = reprlib.Repr()  # for messages: what a client sent may be long
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxdict = 20

_HINTS: dict[str, Any] = get_type_hints(SamplingParams)
_HINTS = {name: _HINTS[name] for name in SamplingParams.__struct_fields__}
_INTEGERS = (int, int | None)
_INTEGER_LISTS = (list[int] | None,)
