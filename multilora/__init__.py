"""multilora: any number of LoRA adapters over one base model, exactly as PEFT defines them.

The public names are `LLM` (offline use), `SamplingParams` and `MultiloraError`; the server is `multilora serve`.
Importing the package imports none of the heavy libraries: `LLM` is looked up on first use.
"""

from typing import TYPE_CHECKING, Any

from multilora.errors import MultiloraError
from multilora.params import SamplingParams

if TYPE_CHECKING:
    from multilora.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "MultiloraError", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from multilora.llm import LLM

        return LLM
    raise AttributeError(f"module 'multilora' has no attribute {name!r}")
