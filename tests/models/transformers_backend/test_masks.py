"""What a mask of transformers means, told from its function of two positions."""

from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_causal_mask_function,
)

from multilora.models.transformers_backend.masks import MarkedMask, MaskMeaning, marked_mask, meaning_of


def test_causal_masks_and_windows() -> None:
    assert meaning_of(causal_mask_function, None) == MaskMeaning(None)
    for window in (1, 7, 4096):
        assert meaning_of(sliding_window_causal_mask_function(window), window) == MaskMeaning(window)


def looks_back_and_ahead(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key <= query + 1


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (looks_back_and_ahead, None),
        (sliding_window_causal_mask_function(7), None),
        (and_masks(causal_mask_function, chunked_overlay(8, torch.zeros(1, dtype=torch.int64))), 8),
        (or_masks(causal_mask_function, looks_back_and_ahead), 9),
    ],
)
def test_other_masks_are_an_obstacle(function: Any, size: int | None) -> None:
    assert "neither causal nor a sliding window" in meaning_of(function, size).obstacle


def test_a_mask_that_needs_the_batch_is_an_obstacle() -> None:
    def of_a_batch(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return torch.empty(1, 9, device="meta")[batch, key] > 0

    assert "depends on the batch" in meaning_of(of_a_batch, None).obstacle


def test_the_meaning_survives_what_models_do_with_masks_and_nothing_else() -> None:
    mask = marked_mask(1, 5, 5, sliding_window_causal_mask_function(3), 3)
    assert mask.shape == (1, 1, 5, 5)
    for kept in (mask[:, :, :, :4], mask.to(torch.float32), mask.contiguous(), mask[..., :3].expand(1, 4, 5, 3)):
        assert isinstance(kept, MarkedMask)
        assert kept.meaning == MaskMeaning(3)
    for other in (mask.float() + 1, torch.where(mask, 0.0, 1.0), mask.logical_not()):
        assert not (isinstance(other, MarkedMask) and hasattr(other, "meaning"))
