"""SGLang's load generator: prompts over two adapters, by /generate and by both OpenAI routes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import URL, check, main, same

TOKENIZER = os.environ.get("MULTILORA_TOKENIZER", "")


def run(backend):
    out = Path(tempfile.mkdtemp(), "out.jsonl")
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", backend, "--base-url", URL,
               "--model", TOKENIZER, "--tokenizer", TOKENIZER, "--dataset-name", "random-ids",
               "--random-input-len", "32", "--random-output-len", "8", "--random-range-ratio", "1.0",
               "--num-prompts", "6", "--max-concurrency", "2", "--lora-name", "pirate", "french",
               "--lora-request-distribution", "uniform", "--output-file", out]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, timeout=400)
    found = json.loads(out.read_text())
    same(found["completed"], 6)
    same(found["total_output_tokens"], 48)
    return f"{found['completed']} requests, first token after {found['mean_ttft_ms']:.0f} ms"


for name in ("sglang", "sglang-oai", "sglang-oai-chat"):
    check(f"bench_serving --backend {name}, two adapters")(lambda name=name: run(name))

main()
