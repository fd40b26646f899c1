"""aiperf: a profile of streamed chat on an adapter."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import ADAPTER, URL, check, main

TOKENIZER = os.environ.get("MULTILORA_TOKENIZER", "")


@check("profile, streamed chat")
def chat():
    out = Path(tempfile.mkdtemp())
    command = [Path(sys.executable).parent / "aiperf", "profile", "--model", ADAPTER, "--url", URL,
               "--endpoint-type", "chat", "--streaming", "--request-count", "5", "--concurrency", "2",
               "--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "8", "--tokenizer", TOKENIZER,
               "--artifact-dir", out, "--ui", "none"]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}  # with it, no local tokenizer
    subprocess.run([str(part) for part in command], check=True, timeout=240, env=env)
    (report,) = out.rglob("profile_export_aiperf.json")
    found = json.loads(report.read_text())
    count = found["request_count"]["avg"]
    assert count == 5, found["request_count"]
    return f"{count} requests, first token after {found['time_to_first_token']['avg']:.1f} ms"


main()
