"""What transformers and PEFT compute with an adapter, in fp32: the reference that `verify` compares the engine with.

It owns the way PEFT is used. Serving does not need PEFT, so it may not be installed; it is imported on first use.
Called by `verify.py`.
"""

import importlib.util
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multilora.adapters.peft.safetensors_file import SafetensorsFile
from multilora.adapters.sources.files import find_files, read_json_object
from multilora.engine.build import choose_device
from multilora.errors import ConfigError
from multilora.lora.sites import EMBED, HEAD

TABLE = re.compile(rf"\.?(?:{EMBED}|{HEAD})(?:\.base_layer|\.modules_to_save)?(?:\.\w+)?\.weight$")


class Reference:
    """The base model as transformers computes it and, after `put_on`, as PEFT does with an adapter."""

    def __init__(self, model_path: str, device: str = "auto"):
        import peft
        from transformers import AutoModelForCausalLM

        self.peft_version: str = peft.__version__
        self._device = choose_device(device)
        self._invocation: list[int] = []
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        self._model.to(self._device).eval()

    @staticmethod
    def check_installed() -> None:
        """Raises ConfigError if PEFT is not installed."""
        if importlib.util.find_spec("peft") is None:
            raise ConfigError("`adapters verify` compares with PEFT, which is not installed: pip install peft")

    def put_on(self, directory: str, special: "SpecialTokens") -> None:
        """Apply an adapter from now on. For added tokens the base model is resized first, as PEFT's users do."""
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about training
            if special.table_rows > self._model.get_input_embeddings().weight.shape[0]:
                self._model.resize_token_embeddings(special.table_rows, mean_resizing=False)
            self._model = PeftModel.from_pretrained(self._model, directory)
        self._model.to(self._device).eval()
        self._invocation = special.invocation

    @torch.inference_mode()
    def logprobs(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """Log-softmax of the logits after each token of both, fp32 [tokens, vocab], on the CPU."""
        ids = prompt + answer
        options: dict[str, Any] = {}
        if self._invocation:  # PEFT would also look for it in the answer
            start = _last(prompt, self._invocation)
            options["alora_offsets"] = [None if start is None else len(ids) - start]
        logits: torch.Tensor = self._model(torch.tensor([ids], device=self._device), **options).logits[0]
        return logits.float().log_softmax(-1).cpu()


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that an adapter treats specially; prompts without them would test little of it."""

    invocation: list[int]  # the invocation sequence of activated LoRA
    trained: list[int]  # tokens whose embeddings it replaces
    table_rows: int  # rows of its full embeddings or head; 0: it has neither

    @classmethod
    def of(cls, directory: Path) -> "SpecialTokens":
        """From an adapter that the engine has loaded, so that its config is known to be sound."""
        files = find_files(directory)
        config = read_json_object(files.config)
        trained = config.get("trainable_token_indices") or []
        lists = trained.values() if isinstance(trained, dict) else [trained]
        return cls(
            invocation=list(config.get("alora_invocation_tokens") or []),
            trained=sorted({token for ids in lists for token in ids}),
            table_rows=max((_table_rows(file) for file in files.weights), default=0),
        )


def _table_rows(path: Path) -> int:
    with SafetensorsFile(path) as file:
        return max((info.shape[0] for name, info in file.tensors.items() if TABLE.search(name)), default=0)


def _last(ids: list[int], part: list[int]) -> int | None:
    """Where `part` begins last in `ids`; None: it does not occur."""
    starts = range(len(ids) - len(part), -1, -1)
    return next((start for start in starts if ids[start : start + len(part)] == part), None)
