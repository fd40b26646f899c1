"""Two adapters at once, each with its weight, in a request; and the same as an adapter that is kept.

python examples/compositions.py
"""

import sys
import tempfile
from pathlib import Path

from multilora import LLM
from multilora.adapter_tools.compose import compose
from multilora.demo import adapter_paths, base_model_path

PROMPT = "Q: What is the capital of France?\nA:"


def main() -> None:
    """The weighted sum, computed in two ways."""
    sql, pirate = (str(adapter_paths()[name]) for name in ("sql", "pirate"))
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "both"
        compose([(pirate, 0.9), (sql, 0.1)], kept, method="cat")
        with LLM(str(base_model_path()), lora_paths={"sql": sql, "pirate": pirate, "both": str(kept)}) as llm:
            asked = [{"name": "pirate", "weight": 0.9}, {"name": "sql", "weight": 0.1}]
            answers = llm.generate([PROMPT, PROMPT], {"temperature": 0}, [asked, "both"])
    for way, answer in zip(("in the request", "kept"), answers, strict=True):
        sys.stdout.write(f"{way}: {answer.text.strip()}\n")


if __name__ == "__main__":
    main()
