"""An answer that must follow a JSON schema, whichever adapter writes it.

python examples/structured_output.py
"""

import json
import sys

from multilora import LLM
from multilora.demo import adapter_paths, base_model_path

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 12}},
    "required": ["answer"],
    "additionalProperties": False,
}


def main() -> None:
    """The grammar is compiled once, and masks what may come next."""
    with LLM(str(base_model_path()), lora_paths={"json": str(adapter_paths()["json"])}) as llm:
        params = {"temperature": 0, "max_new_tokens": 64, "json_schema": json.dumps(SCHEMA)}
        answer = llm.generate("Q: What is the capital of France?\nA:", params, "json")
    sys.stdout.write(f"{json.loads(answer.text)}\n")


if __name__ == "__main__":
    main()
