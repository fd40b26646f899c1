"""Adapters that trainers on top of PEFT wrote: Unsloth, Axolotl, Accelerate with FSDP, DeepSpeed, torch.compile.

They are PEFT's, but with the names of wrappers inside those of tensors, fields of the trainer's own in the config, or
weights in a pickle (which is read with PyTorch's loader for weights only, that runs no code). Called by `convert.py`.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from multilora.adapter_tools.convert.found import FoundAdapter
from multilora.adapters.peft.fields import HARMLESS, REFUSED, USED
from multilora.adapters.peft.tensor_names import PREFIX, parse
from multilora.errors import AdapterInvalid, AdapterUnsupported

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
NESTED = re.compile(r"^(?:base_model\.model\.)+")
KNOWN = USED | HARMLESS | REFUSED.keys()


def read_wrapped(raw: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> FoundAdapter:
    """raw: adapter_config.json. Raises AdapterInvalid for a tensor that PEFT would not write."""
    found = FoundAdapter("PEFT")
    for name, tensor in tensors.items():
        clean = PREFIX + NESTED.sub("", WRAPPERS.sub("", NESTED.sub("", WRAPPERS.sub("", name))))
        if parse(clean) is None:
            raise AdapterInvalid(f"{name}: PEFT writes no such tensor")
        if clean in found.tensors:
            raise AdapterInvalid(f"{name}: it is there twice, under two names")
        found.tensors[clean] = tensor
    renamed = sum(name not in found.tensors for name in tensors)
    if renamed:
        found.notes.append(f"{renamed} tensors had the names of wrappers in theirs")
    auto = raw.get("auto_mapping") or {}
    if isinstance(auto, dict) and auto.get("unsloth_fixed"):
        found.writer = "Unsloth"
    dropped = [name for name, value in raw.items() if name not in KNOWN and value not in (None, False, "", [], {})]
    if dropped:
        raise AdapterUnsupported(f"adapter_config.json: {', '.join(dropped)}: what it means is not known")
    found.config = {name: value for name, value in raw.items() if name in KNOWN}
    base = str(raw.get("base_model_name_or_path") or "")
    if base.lower().endswith(("-bnb-4bit", "-4bit")):
        found.notes.append(
            f"it was trained on {base}, whose weights are quantised: serve it over what that was made from"
        )
    return found


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin`. Raises AdapterInvalid for what is more than tensors."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as e:
        raise AdapterInvalid(f"{file.name} cannot be read: {e.strerror}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as e:
        raise AdapterInvalid(f"{file.name} holds more than tensors, or is broken: {str(e)[:200]}") from None
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise AdapterInvalid(f"{file.name} is no table of tensors")
    return found
