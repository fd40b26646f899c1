"""What transformers says to a prompt, where it says so clearly: held against the engine by several test files."""

from typing import Any

import torch

CLEAR = 1e-3  # least gap between the two best logits; below it rounding could decide


def clear_answer(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor] | None:
    """Greedy tokens, and logprobs [positions, vocab] of all tokens but the first. None if a choice is not clear."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        logits = model(input_ids=whole).logits[0]
    best = logits[len(prompt) - 1 : -1].topk(2).values
    if (best[:, 0] - best[:, 1]).min() < CLEAR:
        return None
    return whole[0, len(prompt) :].tolist(), logits.log_softmax(-1)
