"""guidellm: a benchmark of synthetic prompts on an adapter, all requests of which succeed."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import ADAPTER, URL, check, main

TOKENIZER = os.environ.get("MULTILORA_TOKENIZER", "")


def run(route):
    out = Path(tempfile.mkdtemp())
    command = [Path(sys.executable).parent / "guidellm", "run",
               "--backend", f"kind=openai_http,target={URL},model={ADAPTER},request_format={route}",
               "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=5",
               "--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens=8,processor={TOKENIZER}",
               "--output-path", out / "out.json"]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, timeout=240)
    (report,) = out.rglob("*.json")
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["successful"] == 5 and not totals["errored"], totals
    return totals


@check("run, completions")
def completions():
    return run("/v1/completions")


@check("run, chat completions")
def chat():
    return run("/v1/chat/completions")


main()
