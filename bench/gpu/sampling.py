"""What sampling costs a decode step: the largest batch, each row on an adapter of its own, beside greedy.

Greedy is measured right before each mix, so that both see the machine in the same state. Grammars are compiled for a
made-up tokenizer of the model's size, whose tokens are single bytes and random strings.
"""

import json
import random
import string
import time
from collections.abc import Iterator, Sequence
from typing import Any

import xgrammar

from bench.common import synchronize
from bench.gpu.setup import Bench
from multilora.engine.messages import Outputs, Submit, UseTokenizer
from multilora.params import SamplingParams

GREEDY: dict[str, Any] = {"temperature": 0.0}
DEFAULTS = {"temperature": 0.6, "top_p": 0.9}
PENALTIES = {"repetition_penalty": 1.05, "frequency_penalty": 0.3, "presence_penalty": 0.2}
# name → (parameters, or several that rows take in turns; top logprobs; the most it may add to greedy)
MIXES: dict[str, tuple[list[dict[str, Any]], int, float]] = {
    "temperature": ([{"temperature": 0.8}], -1, 0.03),
    "top_p 0.9, top_k 50": ([{"top_p": 0.9, "top_k": 50}], -1, 0.03),
    "top_p 0.9, temperature 0.6": ([DEFAULTS], -1, 0.03),
    "min_p 0.05": ([{"min_p": 0.05}], -1, 0.03),
    "repetition_penalty 1.05": ([GREEDY | {"repetition_penalty": 1.05}], -1, 0.03),
    "all three penalties": ([GREEDY | PENALTIES], -1, 0.03),
    "logprobs 20": ([GREEDY], 20, 0.08),
    "mixed": ([GREEDY, DEFAULTS, DEFAULTS | PENALTIES, {"min_p": 0.05, "logit_bias": {"5": 2.0}}], -1, 0.06),
}
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "count": {"type": "integer"},
            "kind": {"enum": ["a", "bc", "def"]},
        },
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}
GRAMMAR_MOST = 0.35
WARM = 4  # tokens of every answer before the clock starts
SHORTEST_CHUNK = 512  # prompt tokens of a step, at least


def sampling_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    names = bench.load_group("r16")[: bench.work.batch]
    versions = [bench.infos[name].version for name in names]
    for name, (params, top_logprobs, most) in MIXES.items():
        yield _row(bench, name, versions, most, params, top_logprobs, None)
    yield _row(bench, "a JSON schema", versions, GRAMMAR_MOST, [{}], -1, _grammar(bench))


def _row(
    bench: Bench,
    name: str,
    versions: Sequence[int],
    most: float,
    params: list[dict[str, Any]],
    top_logprobs: int,
    grammar: str | None,
) -> dict[str, Any]:
    greedy, mix = float("inf"), float("inf")
    length = bench.work.decode_prompt
    steady_step_ms(bench, versions, length, params, top_logprobs, grammar)
    for _ in range(bench.work.repeats):
        greedy = min(greedy, steady_step_ms(bench, versions, length))
        mix = min(mix, steady_step_ms(bench, versions, length, params, top_logprobs, grammar))
    row = bench.row(f"decode, batch {len(versions)}, {name}", "ms", greedy * (1 + most))
    return row.show(mix, greedy_ms=greedy, over_greedy_percent=(mix / greedy - 1) * 100)


def steady_step_ms(
    bench: Bench,
    versions: Sequence[int | None],
    length: int,
    params: Sequence[dict[str, Any]] = (GREEDY,),
    top_logprobs: int = -1,
    grammar: str | None = None,
) -> float:
    """Milliseconds of a decode step: one request per adapter (None: the base model) with a prompt of `length` tokens,
    timed while all of them run, from when all have `WARM` tokens. Raises RuntimeError if one ends before."""
    engine, work = bench.llm.engine, bench.work
    first = len(versions) * length // SHORTEST_CHUNK + len(versions)  # tokens of the first before the last has any
    answer = WARM + work.decode_steps + 8 + first
    for i, (ids, version) in enumerate(zip(bench.prompts(len(versions), length), versions, strict=True)):
        some = {"ignore_eos": True, "max_new_tokens": answer, "sampling_seed": i} | params[i % len(params)]
        engine.handle(
            Submit(
                rid=f"{i}",
                input_ids=ids,
                sampling=SamplingParams(**some),
                adapters=() if version is None else ((version, 1.0),),
                return_logprob=top_logprobs >= 0,
                top_logprobs_num=max(top_logprobs, 0),
                grammar=grammar,
            )
        )
    tokens = dict.fromkeys(map(str, range(len(versions))), 0)
    ended: list[str] = []

    def step() -> None:
        for message in engine.step():
            if isinstance(message, Outputs):
                for output in message.items:
                    tokens[output.rid] += len(output.token_ids)
                    if output.finished is not None and output.finished.type == "error":
                        raise RuntimeError(output.finished.message)
                    if output.finished is not None and output.finished.type == "length":
                        ended.append(output.rid)

    while min(tokens.values()) < WARM:
        step()
    synchronize(bench.machine.device)
    begun, start = sum(tokens.values()), time.perf_counter()
    while min(tokens.values()) < WARM + work.decode_steps:
        step()
    seconds = time.perf_counter() - start
    if ended:
        raise RuntimeError(f"{len(ended)} of {len(versions)} requests ended while they were timed")
    steps = (sum(tokens.values()) - begun) / len(versions)
    while engine.busy:
        step()
    return seconds / steps * 1e3


def _grammar(bench: Bench) -> str:
    """As it travels to the engine, which compiles it for the tokenizer that it is handed here."""
    rng = random.Random(0)
    alphabet = string.ascii_letters + string.digits + ' _,:"{}[]'
    ends = bench.llm.engine.ready().eos_token_ids or [0]
    texts = [bytes([i]) for i in sorted(range(256), key=lambda i: not 32 <= i < 127)]  # what JSON needs comes first
    texts += ["".join(rng.choices(alphabet, k=rng.randint(2, 7))).encode() for _ in range(bench.dims.vocab)]
    source = iter(texts)
    tokens = [b"<end>" if i in ends else next(source) for i in range(bench.dims.vocab)]
    info = xgrammar.TokenizerInfo(
        tokens, vocab_type=xgrammar.VocabType.RAW, vocab_size=bench.dims.vocab, stop_token_ids=ends
    )
    bench.llm.engine.handle(UseTokenizer(info.serialize_json()))
    grammar: str = xgrammar.Grammar.from_json_schema(json.dumps(SCHEMA), any_whitespace=False).serialize_json()
    return grammar
