"""transformers' own module tree of a causal LM: how it is built, and how its two halves are called.

The decoder takes embedded rows, the head takes the rows that somebody wants logits of. What lies between decoder and
logits (a scale, a softcap, a transform) stays where transformers has it: the head is the whole model's forward pass
with the decoder answering at once. No weight is allocated here.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from multilora.errors import ModelUnsupported


def causal_lm_class(hf: PretrainedConfig, architecture: str) -> type[PreTrainedModel]:
    """transformers' class of this name. Raises ModelUnsupported if it has none for such a config."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf), ())
    classes = found if isinstance(found, list | tuple) else (found,)
    for cls in classes:
        if cls.__name__ == architecture:
            known: type[PreTrainedModel] = cls
            return known
    raise ModelUnsupported(
        f"architecture {architecture} is not supported: transformers has no causal LM of this name for model_type "
        f"{hf.model_type!r}; docs/models.md lists what is served"
    )


class Tree:
    """One causal LM of transformers, on the meta device when it is made."""

    def __init__(self, hf: PretrainedConfig, architecture: str, dtype: torch.dtype):
        """Raises ModelUnsupported naming what a model of this class lacks."""
        cls = causal_lm_class(hf, architecture)
        try:
            with torch.device("meta"):
                self.lm: Any = cls._from_config(copy.deepcopy(hf), dtype=dtype, attn_implementation="eager")
        except (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
            line = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
            what = f"transformers cannot build it from this config: {line}"
            raise ModelUnsupported(f"{architecture} is not supported: {what}") from None
        self.lm.eval().requires_grad_(False)
        self.wide = set(self.lm._keep_in_fp32_modules_strict or ()) | set(self.lm._keep_in_fp32_modules or ())
        self._keep_wide(dtype)
        self.lm.tie_weights()
        self.decoder = self._decoder(architecture)
        self.embedding_path = self._path_of(self.lm.get_input_embeddings())
        self.head_path = self._path_of(self.lm.get_output_embeddings())
        self._check_tables(architecture)
        self._output: Any = None
        self._rows: torch.Tensor | None = None
        for decoder in {self.decoder, self.lm.get_decoder()} - {None, self.lm}:  # a head may call an inner one
            decoder.forward = partial(self._forward, decoder.forward)

    def _decoder(self, architecture: str) -> Any:
        decoder = getattr(self.lm, self.lm.base_model_prefix, None) if self.lm.base_model_prefix else None
        if not isinstance(decoder, nn.Module) or decoder is self.lm:
            raise ModelUnsupported(f"{architecture} is not supported: it has no decoder apart from its head")
        takes = inspect.signature(decoder.forward).parameters
        for name in ("inputs_embeds", "position_ids"):
            if name not in takes:
                raise ModelUnsupported(f"{architecture} is not supported: its decoder takes no {name}")
        return decoder

    def _check_tables(self, architecture: str) -> None:
        """Raise ModelUnsupported unless embedding and head do nothing but what ours do."""
        for path, kind, scales in ((self.embedding_path, nn.Embedding, True), (self.head_path, nn.Linear, False)):
            own = type(self.lm.get_submodule(path)) if path else None
            plain = own is kind or (scales and own is not None and "Scaled" in own.__name__)
            if not plain:
                what = f"its {'token embedding' if scales else 'head'} is no plain {kind.__name__}"
                raise ModelUnsupported(f"{architecture} is not supported: {what}")

    def _path_of(self, module: Any) -> str:
        return next((path for path, m in self.lm.named_modules() if m is module), "")

    def _forward(self, decode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands for the decoder's forward pass: its rows are known while the head computes."""
        if self._rows is not None:
            return self._output(last_hidden_state=self._rows)
        return decode(*args, **kwargs)

    def hidden(self, x: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
        """x: [tokens, hidden], embedded; positions: int64 [tokens]. Returns [tokens, hidden]."""
        found = self.decoder(inputs_embeds=x[None], position_ids=positions[None], use_cache=False, **options)
        self._output = type(found)
        hidden: torch.Tensor = found.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [rows, hidden], what `hidden` returned. Returns [rows, vocab]."""
        with self._answering(hidden):
            found: torch.Tensor = self.lm(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return found

    @contextmanager
    def _answering(self, hidden: torch.Tensor) -> Iterator[None]:
        self._rows = hidden[None]
        try:
            yield
        finally:
            self._rows = None

    def is_wide(self, name: str) -> bool:
        """Whether transformers keeps the parameter of this name in fp32 beside some 16-bit weights."""
        return any(f".{part}." in f".{name}." for part in self.wide)

    def _keep_wide(self, dtype: torch.dtype) -> None:
        """Do so for weights of this dtype, in place: some beside 16-bit weights of either kind, some beside fp16."""
        if dtype not in (torch.float16, torch.bfloat16):
            return
        strict = set(self.lm._keep_in_fp32_modules_strict or ())
        kept = self.wide if dtype == torch.float16 else strict
        for path, module in self.lm.named_modules():
            for name, param in module._parameters.items():
                if param is not None and any(f".{part}." in f".{path}.{name}." for part in kept):
                    module._parameters[name] = nn.Parameter(param.float(), requires_grad=False)

    def attend_by(self, name: str) -> None:
        """Let every attention layer look for its function under this name."""
        configs = {id(m.config): m.config for m in self.lm.modules() if isinstance(m, PreTrainedModel)}
        for config in configs.values():
            config._attn_implementation = name
        for module in self.lm.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PretrainedConfig) and config._attn_implementation != name:
                config._attn_implementation = name
