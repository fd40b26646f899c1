"""A trainer's loop: after each step the new weights replace the adapter that the server has, through shared memory.

Requests that run finish on the weights that they began with; each answer says whose it is. Trainer and server must be
processes of one user on one machine.

    python examples/hot_swap.py http://localhost:30000
"""

import json
import sys

import httpx
from safetensors.torch import load_file

from multilora.adapter_tools.share import SharedAdapter
from multilora.demo import adapter_paths


def main(url: str) -> None:
    """The "trainer" begins with a demo's adapter and unlearns it: lora_B becomes zero."""
    folder = adapter_paths()["pirate"]
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    with httpx.Client(base_url=url, timeout=300) as http, SharedAdapter(tensors) as shared:
        for step in range(2):
            shared.write(tensors)
            message = shared.message("policy", config, weight_version=f"step-{step}")
            http.post("/load_lora_adapter_from_tensors", json=message).raise_for_status()
            body = {"text": "Q: What is the capital of France?\nA:", "lora_path": "policy"}
            answer = http.post("/generate", json=body | {"sampling_params": {"temperature": 0}}).json()
            tensors = {name: t * ("lora_A" in name) for name, t in tensors.items()}  # what a step of training is
            sys.stdout.write(f"{answer['meta_info']['weight_version']}: {answer['text'].strip()}\n")
        http.post("/unload_lora_adapter", json={"lora_name": "policy"}).raise_for_status()


if __name__ == "__main__":
    main(sys.argv[1])
