"""Embedding and head, tied and untied."""

import torch

from multilora.layers.embedding import Embedding, LMHead
from multilora.layers.testing import BASE
from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice

CPU = torch.device("cpu")
SITE = LoraSite(0, MODEL_LEVEL, "lm_head", 4, (LoraSlice("lm_head", 0, 7),))


def test_tied_head_shares_the_matrix() -> None:
    embedding = Embedding(7, 4, device=CPU, dtype=torch.float32)
    head = LMHead(SITE, 7, 4, tied_to=embedding, device=CPU, dtype=torch.float32)
    assert head.weight is embedding.weight
    own = LMHead(SITE, 7, 4, tied_to=None, device=CPU, dtype=torch.float32)
    assert own.weight is not embedding.weight


def test_logits_are_fp32_whatever_the_model() -> None:
    embedding = Embedding(7, 4, device=CPU, dtype=torch.bfloat16)
    embedding.weight.normal_()
    head = LMHead(SITE, 7, 4, tied_to=embedding, device=CPU, dtype=torch.bfloat16)
    rows = embedding(torch.tensor([3, 6]), BASE)
    assert torch.equal(rows, embedding.weight[[3, 6]])
    logits = head(rows, BASE)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 7)
