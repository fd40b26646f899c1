"""What `LLM.generate` takes in its many forms, as lists with one entry per prompt. Raises BadRequest."""

from typing import Any

from multilora.errors import BadRequest
from multilora.params import SamplingParams

Params = SamplingParams | dict[str, Any] | None


def read_params(value: Params) -> SamplingParams:
    if isinstance(value, SamplingParams):
        value.check()
        return value
    return SamplingParams.parse(value)


def read_prompts(prompts: Any) -> tuple[bool, list[Any]]:
    """(one prompt?, text or token ids of each)"""
    if isinstance(prompts, str):
        return True, [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return True, [items]
    if not items:
        raise BadRequest("no prompts", param="prompts")
    return False, [item if isinstance(item, str) else _token_ids(item) for item in items]


def _token_ids(prompt: Any) -> list[int]:
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(i, int) for i in prompt):
        raise BadRequest(f"a prompt is text or a list of token ids, not {prompt!r:.40}", param="prompts")
    return list(prompt)


def spread(value: Any, count: int, name: str) -> list[Any]:
    """One value for all, or a list with one for each."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise BadRequest(f"{name} has {len(value)} entries for {count} prompts", param=name)
    return list(value)
