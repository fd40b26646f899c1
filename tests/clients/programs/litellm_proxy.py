"""litellm's proxy in front of the server: an OpenAI client asks the proxy for an adapter."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request

from checks import ADAPTER, QUESTION, V1, answer, check, main

PORT = int(os.environ.get("MULTILORA_SPARE_PORT", "0"))
KEY = "sk-0f4b5c1e9a7d4c06b1f2"  # the proxy does not start without one


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, headers)) as found:
        return json.loads(found.read())


@check("chat through the proxy")
def chat():
    config = {
        "model_list": [
            {
                "model_name": "ours",
                "litellm_params": {"model": f"openai/{ADAPTER}", "api_base": V1, "api_key": "none"},
            }
        ]
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        json.dump(config, file)  # JSON is YAML
    command = [os.path.join(os.path.dirname(sys.executable), "litellm"), "--config", file.name, "--port", str(PORT)]
    proxy = subprocess.Popen([*command, "--host", "127.0.0.1"], env=os.environ | {"LITELLM_MASTER_KEY": KEY})
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                ask("/health/liveliness")
                break
            except OSError:
                assert proxy.poll() is None, f"the proxy ended: {proxy.returncode}"
                assert time.monotonic() < deadline, "the proxy did not become ready"
                time.sleep(0.5)
        body = {"model": "ours", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        return answer(ask("/v1/chat/completions", body)["choices"][0]["message"]["content"], ADAPTER)
    finally:
        proxy.terminate()
        proxy.wait()


main()
