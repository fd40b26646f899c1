"""sglang-router (0.3): a router in front of the server passes native and OpenAI requests on."""

import json
import os
import subprocess
import sys
import time
import urllib.request

from checks import ADAPTER, PROMPT, QUESTION, URL, answer, check, main

PORT = int(os.environ.get("MULTILORA_SPARE_PORT", "0"))


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as found:
        return json.loads(found.read() or b"null")


@check("/generate and /v1/chat/completions through the router")
def both():
    command = [sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", URL, "--port", str(PORT)]
    router = subprocess.Popen([*command, "--host", "127.0.0.1", "--policy", "round_robin"])
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/readiness", timeout=2)
                break
            except OSError:
                assert router.poll() is None, f"the router ended: {router.returncode}"
                assert time.monotonic() < deadline, "the router did not become ready"
                time.sleep(0.5)
        body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 64}, "lora_path": ADAPTER}
        answer(ask("/generate", body)["text"], ADAPTER)
        body = {"model": ADAPTER, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        return answer(ask("/v1/chat/completions", body)["choices"][0]["message"]["content"], ADAPTER)
    finally:
        router.terminate()
        router.wait()


main()
