"""SGLang's load generator: its four ways to ask, over one adapter, several of them, and none.

Its command line runs in this process, as one start of it costs many seconds. One of its imports is replaced:
`sglang.srt.disaggregation.utils`, which it needs for the address of `--fake-prefill` alone, would bring in the
server's kernels, which want a GPU.
"""

import json
import os
import sys
import tempfile
import types
from pathlib import Path

import load
from checks import BASE, URL, check, main, same

KERNELS = types.ModuleType("sglang.srt.disaggregation.utils")
KERNELS.FAKE_BOOTSTRAP_HOST = ""
sys.modules[KERNELS.__name__] = KERNELS

from sglang.bench_serving import cli_main  # noqa: E402  # after the replacement

TOKENIZER = os.environ.get("MULTILORA_TOKENIZER", "")
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 6, 24, 8
ADAPTERS = ("sql", "french")


def bench(backend, *flags):
    """What the load generator wrote of a run, and what the server served in it: all of it, and no error."""
    report = Path(tempfile.mkdtemp()) / "report.jsonl"
    before = load.counted()
    sys.argv = [
        "bench_serving", "--backend", backend, "--base-url", URL, "--dataset-name", "random-ids",
        "--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS),
        "--random-range-ratio", "1", "--num-prompts", str(REQUESTS), "--max-concurrency", "3",
        "--disable-tqdm", "--output-details", "--output-file", str(report), *flags,
    ]  # fmt: skip
    cli_main()
    found = json.loads(report.read_text())
    same(found["completed"], REQUESTS)
    same([error for error in found["errors"] if error], [])
    same(found["output_lens"], [OUTPUT_TOKENS] * REQUESTS)
    same(found["total_output_tokens"], REQUESTS * OUTPUT_TOKENS)
    served = load.served(before)
    same(sum(count.requests for count in served.values()), REQUESTS + 1)  # one warms up
    same(sum(count.generated for count in served.values()), (REQUESTS + 1) * OUTPUT_TOKENS)
    return found, served


def first_tokens(found):
    assert all(found["ttfts"]), found["ttfts"]
    return f"{REQUESTS} requests, first token after {1000 * max(found['ttfts']):.0f} ms at most"


@check("bench_serving, backend sglang: two adapters in turn, prompts as token ids")
def native():
    found, served = bench(
        "sglang", "--tokenize-prompt", "--lora-name", *ADAPTERS, "--lora-request-distribution", "distinct"
    )
    same(found["input_lens"], [PROMPT_TOKENS] * REQUESTS)
    half = REQUESTS // 2
    expected = dict(zip(ADAPTERS, (half + 1, half), strict=True))  # the first warms up
    same(served, {name: load.Served(n, n * PROMPT_TOKENS, n * OUTPUT_TOKENS) for name, n in expected.items()})
    return first_tokens(found)


@check("bench_serving, backend sglang: the base model, the cache's report, log-probabilities")
def base():
    found, served = bench("sglang", "--cache-report", "--flush-cache", "--return-logprob", "--top-logprobs-num", "2")
    same(set(served), {BASE})
    prompts = sum(found["input_lens"])  # as the server told it
    same(found["cache_report"]["total_prompt_tokens"], prompts)
    same(served[BASE].prompt, prompts + found["input_lens"][0])
    return first_tokens(found)


@check("bench_serving, backend sglang-oai: two adapters by Zipf's law")
def completions():
    found, served = bench(
        "sglang-oai", "--tokenizer", TOKENIZER, "--lora-name", *ADAPTERS, "--lora-request-distribution", "skewed"
    )
    assert set(served) <= set(ADAPTERS), served
    assert ADAPTERS[0] in served, served
    return first_tokens(found)


@check("bench_serving, backend sglang-oai-chat: two adapters at random")
def chat():
    found, served = bench("sglang-oai-chat", "--lora-name", *ADAPTERS)
    assert set(served) <= set(ADAPTERS), served
    assert ADAPTERS[0] in served, served
    return first_tokens(found)


@check("bench_serving, backend vllm: one adapter")
def vllm():
    found, served = bench("vllm", "--lora-name", ADAPTERS[1])
    same(set(served), {ADAPTERS[1]})
    return first_tokens(found)


main()
