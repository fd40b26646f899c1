"""vLLM's load generator: prompts over two adapters, by both OpenAI routes. (Its module is called, as its command
does: the command itself imports all of vLLM's engine.)"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import BASE, URL, check, main, same

TOKENIZER = os.environ.get("MULTILORA_TOKENIZER", "")
COMMAND = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def run(backend, route):
    out = Path(tempfile.mkdtemp())
    command = [sys.executable, "-c", COMMAND, "--backend", backend, "--base-url", URL, "--endpoint", route,
               "--model", BASE, "--tokenizer", TOKENIZER, "--dataset-name", "random", "--random-input-len", "32",
               "--random-output-len", "8", "--num-prompts", "6", "--max-concurrency", "2", "--ignore-eos",
               "--lora-modules", "pirate", "french", "--save-result", "--result-dir", out]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, timeout=400)
    (report,) = out.glob("*.json")
    found = json.loads(report.read_text())
    same(found["completed"], 6)
    same(found["total_output_tokens"], 48)
    return f"{found['completed']} requests, first token after {found['mean_ttft_ms']:.0f} ms"


@check("bench serve --backend openai, two adapters")
def completions():
    return run("openai", "/v1/completions")


@check("bench serve --backend openai-chat, two adapters")
def chat():
    return run("openai-chat", "/v1/chat/completions")


main()
