"""Base model and adapters from the Hugging Face hub: huggingface_hub's own code against a hub on loopback."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from multilora.demo import adapter_paths, base_model_path

HELPER = Path(__file__).parents[1] / "adapters" / "sources" / "hub_server.py"
SCRIPT = """
from multilora import LLM
with LLM("org/base", lora_paths={"sql": "org/sql@v1"}, device="cpu") as llm:
    print(llm.generate("Q: What is the capital of France?\\nA:", {"temperature": 0}, lora_path="sql").text)
"""


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(cache: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_everything_from_the_hub_then_offline_from_its_cache(tmp_path):
    spec = importlib.util.spec_from_file_location("hub_server", HELPER)
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    repositories = {
        "org/base": {"main": files(base_model_path())},
        "org/sql": {"main": files(adapter_paths()["json"]), "v1": files(adapter_paths()["sql"])},
    }
    with hub.HubServer(repositories) as server:
        online = run(tmp_path, HF_ENDPOINT=server.url)
        assert "SELECT capital" in online.stdout, online.stderr
    offline = run(tmp_path, HF_HUB_OFFLINE="1")
    assert "SELECT capital" in offline.stdout, offline.stderr
    elsewhere = run(tmp_path / "empty", HF_HUB_OFFLINE="1")
    assert elsewhere.returncode != 0
    assert "ConfigError: --model-path org/base" in elsewhere.stderr
