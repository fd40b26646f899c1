"""multilora: any number of LoRA adapters over one base model, exactly as PEFT defines them.

The public names are `LLM` (offline use), `AsyncLLM` (an engine in a process of its own), `SamplingParams` and
`MultiloraError`; the server is `multilora serve`. Importing the package imports none of the heavy libraries: the two
doors are looked up on first use.
"""

from typing import TYPE_CHECKING, Any

from multilora.errors import MultiloraError
from multilora.params import SamplingParams

if TYPE_CHECKING:
    from multilora.llm.offline import LLM
    from multilora.llm.online import AsyncLLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "MultiloraError", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from multilora.llm.offline import LLM

        return LLM
    if name == "AsyncLLM":
        from multilora.llm.online import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module 'multilora' has no attribute {name!r}")
