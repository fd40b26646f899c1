"""The dynamic LoRA sidecar of Kubernetes' Gateway API inference extension: it loads and unloads what its
configuration names. (Its project dropped it in April 2026 for vLLM's file resolver: here `--lora-resolver-dir`.)"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from checks import ADAPTER, PROMPT, URL, V1, answer, check, main, same

SIDECAR = Path(os.environ.get("MULTILORA_SOURCE", ""), "tools", "dynamic-lora-sidecar", "sidecar")
ADAPTERS = Path(os.environ.get("MULTILORA_ADAPTERS", ""))
PORT = os.environ.get("MULTILORA_SPARE_PORT", "0")
CONFIG = Path(tempfile.mkdtemp(), "configmap.yaml")


def write(exist, not_exist):
    models = {key: {"models": [{"id": f"side-{name}", "source": str(ADAPTERS / name)} for name in names]}
              for key, names in (("ensureExist", exist), ("ensureNotExist", not_exist))}  # fmt: skip
    server = urlsplit(URL)
    config = {"host": server.hostname, "port": server.port, "name": "test", "defaultBaseModel": "base"} | models
    CONFIG.write_text(json.dumps({"vLLMLoRAConfig": config}))  # JSON is YAML


def get(url):
    with urllib.request.urlopen(url, timeout=30) as found:
        return found.read().decode()


def wait_for(*names):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        served = [card["id"] for card in json.loads(get(f"{V1}/models"))["data"] if card["id"].startswith("side-")]
        if sorted(served) == sorted(f"side-{name}" for name in names):
            return served
        time.sleep(0.5)
    raise AssertionError(f"served: {served}")


@check("adapters are loaded, served and unloaded as the configuration changes")
def reconcile():
    write([ADAPTER, "french"], [])
    command = [sys.executable, "sidecar.py", "--config", CONFIG, "--reconcile-trigger", "1", "--metrics-port", PORT]
    sidecar = subprocess.Popen([str(part) for part in command], cwd=SIDECAR)
    try:
        wait_for("french", ADAPTER)
        body = {"model": f"side-{ADAPTER}", "prompt": PROMPT, "max_tokens": 64, "temperature": 0}
        request = urllib.request.Request(
            f"{V1}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as found:
            answer(json.loads(found.read())["choices"][0]["text"], ADAPTER)
        write(["french"], [ADAPTER])
        wait_for("french")
        write([], [ADAPTER, "french"])
        wait_for()
        for _ in range(20):  # the sidecar sets its gauge after the answer
            status = [line for line in get(f"http://127.0.0.1:{PORT}").splitlines() if line.startswith("lora_syncer")]
            if all(line.endswith(" 0.0") for line in status):
                break
            time.sleep(0.5)
        same(len(status), 2)
        assert all(line.endswith(" 0.0") for line in status), status
        return status
    finally:
        sidecar.terminate()
        sidecar.wait()


main()
