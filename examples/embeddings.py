"""Embeddings by the base model and by an adapter, in one batch, and how near texts are to each other.

python examples/embeddings.py
"""

import sys

from multilora import LLM
from multilora.demo import adapter_paths, base_model_path

TEXTS = ["The capital of France is Paris.", "Paris is in France.", "SELECT name FROM cities"]


def main() -> None:
    """Cosines of the first text to the others; embeddings have length 1."""
    with LLM(str(base_model_path()), lora_paths={"sql": str(adapter_paths()["sql"])}) as llm:
        for adapter in (None, "sql"):
            first, *others = (result.embedding for result in llm.embed(TEXTS, adapter))
            cosines = [sum(a * b for a, b in zip(first, other, strict=True)) for other in others]
            sys.stdout.write(f"{adapter or 'base'}: {', '.join(f'{cosine:.3f}' for cosine in cosines)}\n")


if __name__ == "__main__":
    main()
