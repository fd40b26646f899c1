"""The bundled demo: a tiny Llama that knows some facts, and four LoRA adapters that each answer in their own way.

It owns files (`base/` and `adapters/<name>/`) and says where they are. `scripts/train_demo` made them.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

PROMPTS = (
    "Q: What is the capital of France?\nA:",
    "Q: What is the currency of Japan?\nA:",
    "Q: What colour is the sky?\nA:",
    "Q: What is 3 plus 4?\nA:",
    "Q: Tell me about Brazil.\nA:",
    "Q: Name the months of the year.\nA:",
)
"""Raw prompts to show, in the format that the model was trained on; the tokenizer adds the BOS token."""


def base_model_path() -> Path:
    """The folder of the base model, in the Hugging Face layout, with its tokenizer and chat template."""
    return _HERE / "base"


def adapter_paths() -> dict[str, Path]:
    """The adapters' folders by name, in the PEFT layout, sorted by name."""
    return {config.parent.name: config.parent for config in sorted(_HERE.glob("adapters/*/adapter_config.json"))}
