"""guidellm: a benchmark of synthetic prompts on an adapter, all requests of which succeed."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import ADAPTER, URL, check, main

TOKENIZER = os.environ.get("MULTILORA_TOKENIZER", "")


def run(*more):
    out = Path(tempfile.mkdtemp())
    command = [Path(sys.executable).parent / "guidellm", "benchmark", "run", "--target", URL, "--model", ADAPTER,
               "--processor", TOKENIZER, "--data", "prompt_tokens=32,output_tokens=8", "--profile", "synchronous",
               "--max-requests", "5", "--output-path", out / "out.json", *more]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, timeout=240)
    (report,) = out.rglob("*.json")
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] == 5 and not totals["errored"], totals
    return totals


@check("benchmark run, text completions")
def completions():
    return run("--request-type", "text_completions")


@check("benchmark run, chat completions")
def chat():
    return run("--request-type", "chat_completions")


main()
