"""vLLM's load generator, `vllm bench serve`: completions and chats, over one adapter, several of them, and none.

Its command line runs in this process, as one start of it costs many seconds. One of its imports is replaced:
`vllm.lora.utils`, which it needs for adapters that it makes up for itself, would bring in the layers of vLLM's
engine, which want compiled code and a GPU.
"""

import json
import os
import sys
import tempfile
import types
from pathlib import Path

import load
from checks import ADAPTER, BASE, URL, check, main, same

LAYERS = types.ModuleType("vllm.lora.utils")
LAYERS.get_adapter_absolute_path = None
sys.modules[LAYERS.__name__] = LAYERS

from vllm.benchmarks import serve  # noqa: E402  # after the replacement
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

TOKENIZER = os.environ.get("MULTILORA_TOKENIZER", "")
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 6, 24, 8
ADAPTERS = ("sql", "french")
COMPLETIONS = ("--backend", "openai", "--endpoint", "/v1/completions")
CHATS = ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions")


def bench(*flags, warmups=0):
    """What the load generator wrote of a run, and what the server served in it: all of it, and no error."""
    folder = Path(tempfile.mkdtemp())
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    arguments = parser.parse_args([
        "--base-url", URL, "--model", BASE, "--tokenizer", TOKENIZER, "--dataset-name", "random",
        "--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS),
        "--num-prompts", str(REQUESTS), "--max-concurrency", "3", "--num-warmups", str(warmups), "--ignore-eos",
        "--disable-tqdm", "--save-result", "--save-detailed", "--result-dir", str(folder), *flags,
    ])  # fmt: skip
    before = load.counted()
    serve.main(arguments)
    (report,) = folder.glob("*.json")
    found = json.loads(report.read_text())
    same((found["completed"], found["failed"]), (REQUESTS, 0))
    same([error for error in found["errors"] if error], [])
    same(found["output_lens"], [OUTPUT_TOKENS] * REQUESTS)
    served = load.served(before)
    same(sum(count.requests for count in served.values()), REQUESTS + warmups)
    same(sum(count.generated for count in served.values()), (REQUESTS + warmups) * OUTPUT_TOKENS)
    if not warmups:
        same(sum(count.prompt for count in served.values()), sum(found["input_lens"]))  # as the server told it
    return found, served


def first_tokens(found):
    assert all(found["ttfts"]), found["ttfts"]
    return f"{REQUESTS} requests, first token after {1000 * max(found['ttfts']):.0f} ms at most"


@check("bench serve, completions: two adapters in turn")
def in_turn():
    found, served = bench(*COMPLETIONS, "--lora-modules", *ADAPTERS, "--lora-assignment", "round-robin")
    half = REQUESTS // 2
    same({name: count.requests for name, count in served.items()}, dict.fromkeys(ADAPTERS, half))
    return first_tokens(found)


@check("bench serve, completions: the base model, warmed up, at a rate, log-probabilities")
def base():
    rate = ("--request-rate", "20", "--logprobs", "2", "--temperature", "0")
    found, served = bench(*COMPLETIONS, *rate, "--ready-check-timeout-sec", "0", warmups=2)
    same(set(served), {BASE})
    return first_tokens(found)


@check("bench serve, chats: two adapters at random")
def chats():
    found, served = bench(*CHATS, "--lora-modules", *ADAPTERS)
    assert set(served) <= set(ADAPTERS), served
    return first_tokens(found)


@check("bench serve, chats: an adapter as the served model")
def adapter():
    found, served = bench(*CHATS, "--served-model-name", ADAPTER)
    same(set(served), {ADAPTER})
    return first_tokens(found)


main()
