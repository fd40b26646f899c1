"""Activated LoRA: an adapter that acts only from its invocation tokens on, so that what stands before them is shared.

python examples/activated_lora.py

The document is computed once, by the base model; each adapter after that takes its keys and values from the cache.
Real ones are trained this way (PEFT's `LoraConfig(alora_invocation_tokens=…)`); the bundled ones were not, and
are told here to act from "A:" on.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from multilora import LLM
from multilora.demo import adapter_paths, base_model_path

DOCUMENT = "Q: What is the capital of France?\nA: The capital of France is Paris.\n"
QUESTION = "Q: What is the currency of Japan?\nA:"
INVOCATION = "\nA:"


def activated(name: str, tokens: list[int], folder: Path) -> str:
    """A copy of a bundled adapter, whose config names the tokens that it waits for."""
    copy = folder / name
    shutil.copytree(adapter_paths()[name], copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": tokens}))
    return str(copy)


def main() -> None:
    """The base model first, then two adapters on the same text."""
    with tempfile.TemporaryDirectory() as folder, LLM(str(base_model_path()), enable_lora=True) as llm:
        tokens = llm.tokenizer.encode(INVOCATION, add_special_tokens=False)
        for name in ("sql", "pirate"):
            llm.load_lora_adapter(name, activated(name, tokens, Path(folder)))
        for name in (None, "sql", "pirate"):
            answer = llm.generate(DOCUMENT + QUESTION, {"temperature": 0, "max_new_tokens": 48}, name)
            shared = f"{answer.cached_tokens} of {answer.prompt_tokens} tokens from the cache"
            sys.stdout.write(f"{name or 'base'}: {answer.text.strip()} ({shared})\n")


if __name__ == "__main__":
    main()
