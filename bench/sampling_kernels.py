"""`Sampler.sample` alone, on random logits: milliseconds of the device, and of the host until all is queued.

    python -m bench.sampling_kernels [--rows 64] [--vocab 128256] [--spread 3.0] [--out FILE]

spread: standard deviation of the logits, which are rounded to bf16 as a head gives them. Greedy is the first line;
the other lines say what they add to it. The last line is one JSON.
"""

import argparse
import json
from statistics import median
from time import perf_counter
from typing import Any

import torch
import xgrammar

from bench.common import environment, finish, say
from multilora.engine.sampling.sampler import Sampler
from multilora.engine.sampling.state import SamplingState
from multilora.params import SamplingParams

PENALTIES = {"repetition_penalty": 1.05, "frequency_penalty": 0.3, "presence_penalty": 0.2}
GREEDY: dict[str, Any] = {"temperature": 0.0}
# name → (parameters that rows take in turns, top logprobs, whether under a grammar)
MIXES: dict[str, tuple[list[dict[str, Any]], int, bool]] = {
    "greedy": ([GREEDY], -1, False),
    "temperature": ([{}], -1, False),
    "min_p 0.05": ([{"min_p": 0.05}], -1, False),
    "top_k 50": ([{"top_k": 50}], -1, False),
    "top_p 0.9": ([{"top_p": 0.9}], -1, False),
    "top_p 0.9, top_k 50": ([{"top_p": 0.9, "top_k": 50}], -1, False),
    "top_p 0.9, every eighth row": ([{"top_p": 0.9}] + [GREEDY] * 7, -1, False),
    "repetition_penalty 1.05": ([GREEDY | {"repetition_penalty": 1.05}], -1, False),
    "all three penalties": ([GREEDY | PENALTIES], -1, False),
    "penalties, top_p 0.9": ([PENALTIES | {"top_p": 0.9}], -1, False),
    "logit_bias": ([GREEDY | {"logit_bias": {str(i): 0.5 for i in range(100)}}], -1, False),
    "logprobs 0": ([GREEDY], 0, False),
    "logprobs 20": ([GREEDY], 20, False),
    "grammar": ([GREEDY], -1, True),
}
STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--spread", type=float, default=3.0)
    parser.add_argument("--out", help="also write the result to this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = environment("triton") | {"rows": {}, "shape": [args.rows, args.vocab], "spread": args.spread}
    logits = torch.randn(args.rows, args.vocab, generator=torch.Generator().manual_seed(0)) * args.spread
    logits = logits.bfloat16().float().to(device)
    greedy = 0.0
    for name, mix in MIXES.items():
        device_ms, host_ms = measure(logits, *mix)
        greedy = greedy or device_ms
        result["rows"][name] = {"device_ms": round(device_ms, 4), "host_ms": round(host_ms, 4)}
        say(f"{name:<32}device {device_ms:8.3f} ms (+{device_ms - greedy:6.3f})   host {host_ms:8.3f} ms")
    finish(result, args.out)


def measure(
    logits: torch.Tensor, params: list[dict[str, Any]], top_logprobs: int, grammar: bool
) -> tuple[float, float]:
    """(device, host) milliseconds of a step, medians."""
    rows, vocab = logits.shape
    sampler = Sampler(vocab, logits.device, [0])
    source = compiled_grammar(sampler, vocab) if grammar else None
    for slot in range(rows):
        sampler.install(
            SamplingState(
                slot=slot,
                params=SamplingParams(**params[slot % len(params)]),
                seed=slot,
                prompt_ids=list(range(1000)),
                vocab_size=vocab,
                top_logprobs=top_logprobs,
                grammar=source,
            )
        )
    slots, host, device = list(range(rows)), [], []
    for step in range(STEPS + 3):
        timer = Timer(logits.device)
        sampled = sampler.sample(logits, slots, [step] * rows)
        queued, done = timer.queued(), timer.done()
        sampler.read(sampled.to_cpu())
        if step >= 3:
            host.append(queued)
            device.append(done)
    return median(device), median(host)


class Timer:
    """Milliseconds from its making on. On CUDA `done` is the time of the device alone: it has work before, so
    that it does not wait for the host."""

    def __init__(self, device: torch.device):
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(20_000_000)  # cycles, about 10 ms  # noqa: SLF001 - torch offers no public way to keep the device busy
            self._events[0].record()
        self._start = perf_counter()

    def queued(self) -> float:
        return (perf_counter() - self._start) * 1e3

    def done(self) -> float:
        if self._events is None:
            return self.queued()
        self._events[1].record()
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1])


def compiled_grammar(sampler: Sampler, vocab: int) -> str:
    """A string of letters of any length, for a tokenizer of bytes and pairs of bytes, which the sampler is told."""
    tokens = [bytes([i]) if i < 256 else bytes([65 + i % 57, 65 + i // 57 % 57]) for i in range(vocab)]
    info = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.RAW, vocab_size=vocab, stop_token_ids=[0])
    sampler.use_tokenizer(info.serialize_json())
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    grammar: str = xgrammar.Grammar.from_json_schema(json.dumps(schema)).serialize_json()
    return grammar


if __name__ == "__main__":
    main()
