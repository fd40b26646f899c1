"""What the tests through all doors share: a tiny model with adapters, and each door over one engine of it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import DOORS, ROWS, TOKENIZER, Door
from fakes.models import make_adapter, make_tiny_model
from fakes.tokenizers import with_added_tokens


@pytest.fixture(scope="session")
def door_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, the plain adapters a and b, and `own`, whose tokenizer has two tokens more; a broken copy of that."""
    path = tmp_path_factory.mktemp("doors")
    make_tiny_model(path / "model", vocab_size=ROWS, bos_token_id=0, eos_token_id=1)
    TOKENIZER.hf.save_pretrained(path / "model")
    for seed, name in enumerate("ab"):
        make_adapter(path / name, path / "model", seed=seed, r=8, lora_alpha=16, target_modules="all-linear")
    tokens: dict[str, Any] = {
        "prepare": lambda model: model.resize_token_embeddings(ROWS + 2, mean_resizing=False),
        "modules_to_save": ["embed_tokens", "lm_head"],
    }
    make_adapter(path / "own", path / "model", seed=3, r=8, target_modules="all-linear", **tokens)
    shutil.copytree(path / "own", path / "broken")
    with_added_tokens(TOKENIZER, "<|call|>", eos="<|end|>").hf.save_pretrained(path / "own")
    (path / "broken" / "tokenizer.json").write_text("{")
    return path


@pytest.fixture(scope="session", params=DOORS)
def door(request: pytest.FixtureRequest, door_files: Path) -> Iterator[Door]:
    """With adapters a and b; a test leaves it as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    paths = {name: str(door_files / name) for name in "ab"}
    door = DOORS[request.param](door_files / "model", lora_paths=paths, device="cpu", max_total_tokens=4096)
    yield door
    door.close()
    torch.set_num_threads(threads)
