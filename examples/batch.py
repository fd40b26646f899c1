"""Many prompts, each with an adapter of its own, in one batch and without a server.

python examples/batch.py
"""

import sys

from multilora import LLM
from multilora.demo import adapter_paths, base_model_path


def main() -> None:
    """Four adapters and the base model, asked the same."""
    paths = {name: str(path) for name, path in adapter_paths().items()}
    with LLM(str(base_model_path()), lora_paths=paths) as llm:
        names = [None, *paths]
        prompts = ["Q: What is the capital of France?\nA:"] * len(names)
        answers = llm.generate(prompts, {"temperature": 0, "max_new_tokens": 48}, names)
        for name, answer in zip(names, answers, strict=True):
            sys.stdout.write(f"{name or 'base'}: {answer.text.strip()}\n")


if __name__ == "__main__":
    main()
