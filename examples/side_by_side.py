"""One prompt to the base model and to every loaded adapter, in one batch of the server, answers below each other.

python examples/side_by_side.py http://localhost:30000 "Q: What is the capital of France?
A:"
"""

import sys

import httpx


def main(url: str, prompt: str) -> None:
    """Which adapters there are, `/v1/models` says: the base model first."""
    models = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
    names = [None, *models[1:]]
    body = {
        "text": [prompt] * len(names),
        "lora_path": names,
        "sampling_params": {"temperature": 0, "max_new_tokens": 48},
    }
    response = httpx.post(f"{url}/generate", json=body, timeout=300)
    response.raise_for_status()
    for name, answer in zip(names, response.json(), strict=True):
        sys.stdout.write(f"{name or 'base'}: {answer['text'].strip()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
