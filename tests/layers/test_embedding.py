"""Embedding and head, tied and untied."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from fakes.layer_context import BASE

from multilora.layers.embedding import Embedding, LMHead
from multilora.lora.full_weights import FullWeightModules
from multilora.lora.sites import MODEL_LEVEL, LoraSite, LoraSlice
from multilora.lora.table import FullWeight, Piece

CPU = torch.device("cpu")
SITE = LoraSite(0, MODEL_LEVEL, "lm_head", 4, (LoraSlice("lm_head", 0, 7),))
EMBED_SITE = LoraSite(1, MODEL_LEVEL, "embed_tokens", 7, (LoraSlice("embed_tokens", 0, 4),))


def test_tied_head_shares_the_matrix() -> None:
    embedding = Embedding(EMBED_SITE, device=CPU, dtype=torch.float32)
    head = LMHead(SITE, tied_to=embedding, device=CPU, dtype=torch.float32)
    assert head.weight is embedding.weight
    own = LMHead(SITE, tied_to=None, device=CPU, dtype=torch.float32)
    assert own.weight is not embedding.weight


def test_logits_are_fp32_whatever_the_model() -> None:
    embedding = Embedding(EMBED_SITE, device=CPU, dtype=torch.bfloat16)
    embedding.weight.normal_()
    head = LMHead(SITE, tied_to=embedding, device=CPU, dtype=torch.bfloat16)
    rows = embedding(torch.tensor([3, 6]), BASE)
    assert torch.equal(rows, embedding.weight[[3, 6]])
    logits = head(rows, BASE)
    assert logits.dtype == torch.float32
    assert logits.shape == (2, 7)


class Replaced(FullWeightModules):
    """Rows [1, 3) have the weight `weight`."""

    def __init__(self, weight: torch.Tensor, token_ids: torch.Tensor | None = None):
        self.weights = FullWeight(*weight.shape, (Piece(0, 0, weight[:2]), Piece(2, 0, weight[2:])), token_ids)

    def find(self, layer: int, module: str) -> Iterator[tuple[slice, FullWeight]]:
        assert (layer, module) == (MODEL_LEVEL, "lm_head")
        yield slice(1, 3), self.weights


def replaced_logits(replaced: Replaced) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    head = LMHead(SITE, tied_to=None, device=CPU, dtype=torch.float32)
    head.weight.normal_(generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    return head(hidden, replace(BASE, full_weights=replaced)), hidden, head(hidden, BASE)


def test_an_adapter_with_more_tokens_widens_only_its_own_rows() -> None:
    weight = torch.randn(9, 4)
    logits, hidden, plain = replaced_logits(Replaced(weight))
    assert logits.shape == (4, 9)
    torch.testing.assert_close(logits[1:3], hidden[1:3] @ weight.T)
    assert torch.equal(logits[[0, 3], :7], plain[[0, 3]])
    assert bool((logits[[0, 3], 7:] == -torch.inf).all())


def test_an_adapter_with_fewer_tokens_ends_earlier() -> None:
    weight = torch.randn(5, 4)
    logits, hidden, plain = replaced_logits(Replaced(weight))
    assert logits.shape == (4, 7)
    torch.testing.assert_close(logits[1:3, :5], hidden[1:3] @ weight.T)
    assert bool((logits[1:3, 5:] == -torch.inf).all())
    assert torch.equal(logits[[0, 3]], plain[[0, 3]])


def test_rows_of_the_head() -> None:
    weight = torch.randn(3, 4)
    logits, hidden, plain = replaced_logits(Replaced(weight, torch.tensor([0, 4, 6])))
    plain[1:3, [0, 4, 6]] = hidden[1:3] @ weight.T
    torch.testing.assert_close(logits, plain)
