"""guidellm: runs against the base model and adapters, prompts made up or read from a file, chats and completions."""

import json
import os
import sys
import tempfile
from pathlib import Path

import load
from checks import ADAPTER, BASE, PROMPT, URL, check, main, same

TOKENIZER = os.environ.get("MULTILORA_TOKENIZER", "")
TOOL = Path(sys.executable).with_name("guidellm")
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 6, 32, 8


def benchmark(model, data, profile, route):
    """The benchmark of guidellm's report, once it and the server agree on what was done, and only `model` did it."""
    report = Path(tempfile.mkdtemp()) / "report.json"
    before = load.counted()
    load.run(
        TOOL, "run", "--disable-console-interactive",
        "--backend", f"kind=openai_http,target={URL},model={model},request_format={route}",
        "--profile", profile, "--constraint", f"kind=max_requests,count={REQUESTS}", "--data", data,
        "--tokenizer", f"kind=hf_auto,model={TOKENIZER}", "--output", f"kind=json,path={report}",
    )  # fmt: skip
    (found,) = json.loads(report.read_text())["benchmarks"]
    totals = found["metrics"]["request_totals"]
    same(totals, {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS})
    done = found["requests"]["successful"]
    same([request["output_tokens"] for request in done], [OUTPUT_TOKENS] * REQUESTS)
    told = load.Served(REQUESTS, sum(r["prompt_tokens"] for r in done), REQUESTS * OUTPUT_TOKENS)
    same(load.served(before), {model: told})
    return found


def first_tokens(found):
    """How long the first tokens took, which a server that does not stream would not show."""
    milliseconds = [request["time_to_first_token_ms"] for request in found["requests"]["successful"]]
    assert all(milliseconds), milliseconds
    return f"{REQUESTS} requests, first token after {max(milliseconds):.0f} ms at most"


def made_up():
    return f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"


@check("run, base model: chats made up, two at once")
def base():
    return first_tokens(benchmark(BASE, made_up(), "kind=concurrent,streams=2", "/v1/chat/completions"))


@check("run, adapter: completions made up, all at once")
def completions():
    found = benchmark(ADAPTER, made_up(), f"kind=throughput,max_concurrency={REQUESTS}", "/v1/completions")
    exact = [request["prompt_tokens"] for request in found["requests"]["successful"]]
    assert all(abs(n - PROMPT_TOKENS) <= 2 for n in exact), exact
    return first_tokens(found)


@check("run, adapter: completions of a file, one after another")
def file():
    rows = Path(tempfile.mkdtemp()) / "prompts.jsonl"
    row = {"prompt": PROMPT, "output_tokens_count": OUTPUT_TOKENS}
    rows.write_text(f"{json.dumps(row)}\n" * REQUESTS)
    found = benchmark(ADAPTER, f"kind=json_file,path={rows}", "kind=synchronous", "/v1/completions")
    answers = {request["output"].strip() for request in found["requests"]["successful"]}
    assert len(answers) == 1, answers
    assert answers.pop().startswith("Arr"), answers
    return first_tokens(found)


main()
