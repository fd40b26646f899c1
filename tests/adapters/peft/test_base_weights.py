"""Comparing a table with the base model's, wherever and in whatever dtype that lies."""

from pathlib import Path

import pytest
import torch
from fakes.models import make_tiny_model
from safetensors.torch import load_file, save_file

from multilora.adapters.peft.base_weights import ROWS, differing_rows
from multilora.errors import AdapterError

EMBED = ("model.embed_tokens.weight",)
HEAD = ("lm_head.weight", *EMBED)


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_rows_that_differ(shards: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    for names, weight in ((EMBED, model.get_input_embeddings().weight), (HEAD, model.get_output_embeddings().weight)):
        weight = weight.detach().clone()
        assert differing_rows(weight, names, str(tmp_path)) == []
        weight[7, 3] += 1e-3
        weight[100] = 0
        weight[9, 9] = torch.nan
        assert differing_rows(weight, names, str(tmp_path)) == [7, 9, 100]


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, tie_word_embeddings=True)
    assert differing_rows(model.get_input_embeddings().weight.detach(), HEAD, str(tmp_path)) == []


def test_numbers_count_and_not_dtypes(tmp_path: Path) -> None:
    table = torch.randn(2 * ROWS + 5, 8).bfloat16()
    save_file({EMBED[0]: table}, tmp_path / "model.safetensors")
    assert differing_rows(table.float(), EMBED, str(tmp_path)) == []
    finer = table.float()
    finer[2 * ROWS + 1] *= 1.0001
    assert differing_rows(finer, EMBED, str(tmp_path)) == [2 * ROWS + 1]


def test_a_base_model_that_is_gone(tmp_path: Path) -> None:
    weight = make_tiny_model(tmp_path).get_input_embeddings().weight.detach()
    tensors = load_file(tmp_path / "model.safetensors")
    for change in ("a name", "a file", "everything"):
        if change == "a name":
            save_file({k: v for k, v in tensors.items() if k != EMBED[0]}, tmp_path / "model.safetensors")
        elif change == "a file":
            (tmp_path / "model.safetensors").write_bytes(b"nothing")
        else:
            (tmp_path / "model.safetensors").unlink()
        with pytest.raises(AdapterError, match=r"the base model in .* cannot be read"):
            differing_rows(weight, EMBED, str(tmp_path))
