"""Adapters as kohya's scripts and LyCORIS write them: flat names, a `.alpha` for each module.

    lora_te_model_layers_0_self_attn_q_proj.lora_down.weight     A [rank, in]
    lora_te_model_layers_0_self_attn_q_proj.lora_up.weight       B [out, rank]
    lora_te_model_layers_0_self_attn_q_proj.alpha                a number; the scaling is alpha / rank

The dots of a module's path have become underscores, which the base model's own paths undo, or without it the usual
names of a decoder. Called by `convert.py`.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from multilora.adapter_tools.convert.found import FoundAdapter
from multilora.errors import AdapterInvalid, AdapterUnsupported

SUFFIXES = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha"}
REFUSED = {
    "hada_": "LoHa (hada_*)",
    "lokr_": "LoKr (lokr_*)",
    "lora_mid": "LoCon with a Tucker core (lora_mid)",
    "dora_scale": "DoRA as LyCORIS writes it (dora_scale)",
    "oft_": "OFT (oft_*)",
    "diff": "full differences (diff)",
}
IMAGE = re.compile(r"lora_unet_|lora_te\d?_text_model_|(?:double|single)_blocks_|(?:down|up|mid)_blocks?_")
DECODER = re.compile(r"(?:^|_)layers_(\d+)_(self_attn|mlp)_([a-z0-9_]+)$")


def is_kohya(names: Iterable[str]) -> bool:
    """Whether a file with tensors of these names is one of kohya's."""
    return any(name.endswith((".lora_down.weight", ".hada_w1_a", ".lokr_w1")) for name in names)


def read_kohya(tensors: Mapping[str, torch.Tensor], paths: Iterable[str] | None) -> FoundAdapter:
    """paths: every linear module of the base model; None: it is not known. Raises AdapterUnsupported and
    AdapterInvalid, naming the tensor."""
    flat = None if paths is None else {path.replace(".", "_"): path for path in paths}
    found = FoundAdapter("kohya")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.partition(".")
        if IMAGE.search(module):
            raise AdapterUnsupported(f"{name} is of an image model: only adapters of language models are converted")
        for mark, what in REFUSED.items():
            if suffix.startswith(mark):
                raise AdapterUnsupported(f"{name}: {what} is no LoRA that PEFT's format could hold as such")
        if suffix not in SUFFIXES:
            raise AdapterInvalid(f"{name}: kohya's files have no such tensor")
        modules.setdefault(module, {})[SUFFIXES[suffix]] = tensor
    for module, parts in sorted(modules.items()):
        if not {"a", "b"} <= parts.keys():
            raise AdapterInvalid(f"{module}: lora_down or lora_up is missing")
        rank = parts["a"].shape[0]
        alpha = float(parts["alpha"]) if "alpha" in parts else float(rank)  # as kohya reads it
        found.add(_path(module, flat), parts["a"], parts["b"], alpha)
    return found


def _path(module: str, flat: Mapping[str, str] | None) -> str:
    """The module's path in the base model."""
    if flat is not None:
        ends = [path for name, path in flat.items() if module.endswith(f"_{name}")]
        if len(ends) == 1:
            return ends[0]
        inner = [path for name, path in flat.items() if module.endswith("_" + name.partition("_")[2])]
        if len(inner) != 1:
            raise AdapterInvalid(f"{module}: the base model has no such module")
        return inner[0]
    decoder = DECODER.search(module)
    if decoder is None:
        raise AdapterInvalid(f"{module}: which module that is, only the base model says: give --model-path")
    return f"model.layers.{decoder[1]}.{decoder[2]}.{decoder[3]}"
