"""`adapter_config.json` as PEFT writes it, checked, with PEFT's rules for rank, scaling and targets of a module.

Owns the three lists of fields: used, harmless at inference, refused. A field in none of them is refused unless it is
null, false or empty, so that nothing which changes the arithmetic is ever ignored. Knows nothing of tensors.
Called by `checkpoint`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.adapters.files import show
from multilora.adapters.peft_match import PatternError, layer_index, matches_modules, pattern_key
from multilora.errors import AdapterInvalid, AdapterUnsupported

# fmt: off
USED = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
))
HARMLESS = frozenset((
    # who made it, from what
    "auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type",
    # training only; what they led to is in the weights and in rank_pattern
    "inference_mode", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    # of PEFT at run time
    "runtime_config", "ephemeral_gpu_offload", "merge_weights", "megatron_core",
    # PEFT itself sets it to false for every nn.Linear; lora_A and lora_B are stored the same way
    "fan_in_fan_out",
    # means something only with use_qalora; only for embeddings, whose tensors are refused
    "qalora_group_size", "ensure_weight_tying",
))
# fmt: on
REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "lora_bias": "a bias on lora_B (lora_bias)",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "alora_invocation_string": "activated LoRA (alora_invocation_string)",
    "target_parameters": "target_parameters",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "megatron_config": "Megatron layers (megatron_config)",
    "enable_lora": "merged linear layers of old PEFT (enable_lora)",
}
# With these, PEFT changes the base weights whenever it loads the adapter; the file alone is not the difference.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")
KNOWN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """The fields that decide the arithmetic. Module names are those inside the base model."""

    file: str  # for messages
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]

    def rank(self, name: str) -> int:
        """The rank that PEFT would give module `name`."""
        key = self._pattern_key("rank_pattern", name)
        return self.r if key is None else self.rank_pattern[key]

    def scaling(self, name: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        key = self._pattern_key("alpha_pattern", name)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, name: str) -> bool:
        """Whether PEFT would put LoRA on the linear module `name`, which is not the output layer."""
        try:
            if self.exclude_modules and matches_modules(self.exclude_modules, name):
                return False
            if isinstance(self.target_modules, str):
                return self.target_modules.lower() == "all-linear" or matches_modules(self.target_modules, name)
            if name in self.target_modules:
                return True
            if not matches_modules(self.target_modules, name):
                return False
            return self.layers_to_transform is None or (
                layer_index(self.layers_pattern, name) in self.layers_to_transform
            )
        except PatternError as e:
            raise AdapterInvalid(f"{self.file}: target_modules, exclude_modules or layers_pattern: {e}") from None

    def _pattern_key(self, field: str, name: str) -> str | None:
        try:
            return pattern_key(getattr(self, field), name)
        except PatternError as e:
            raise AdapterInvalid(f"{self.file}: {field}: {e}") from None


def parse_config(raw: dict[str, Any], path: Path) -> PeftConfig:
    """Check every field. Raises AdapterInvalid naming file and field, AdapterUnsupported naming the feature."""
    fields = _Fields(path.name, raw)
    fields.check_known()
    fields.check_init()
    targets = fields.modules("target_modules", required=True)
    layers = fields.layers()
    layers_pattern = fields.modules("layers_pattern")
    if isinstance(targets, str) and (layers is not None or layers_pattern):
        raise fields.invalid("layers_to_transform", "cannot be used when target_modules is a string")
    if layers_pattern and layers is None:
        raise fields.invalid("layers_pattern", "needs layers_to_transform")
    return PeftConfig(
        file=path.name,
        r=fields.rank("r", raw.get("r")),
        lora_alpha=fields.alpha("lora_alpha", raw.get("lora_alpha")),
        use_rslora=fields.flag("use_rslora"),
        rank_pattern={
            k: fields.rank(f"rank_pattern[{show(k)}]", v) for k, v in fields.mapping("rank_pattern").items()
        },
        alpha_pattern={
            k: fields.alpha(f"alpha_pattern[{show(k)}]", v) for k, v in fields.mapping("alpha_pattern").items()
        },
        target_modules=targets,
        exclude_modules=fields.modules("exclude_modules"),
        layers_to_transform=layers,
        layers_pattern=(layers_pattern,)
        if isinstance(layers_pattern, str) and layers_pattern
        else tuple(layers_pattern),
    )


@dataclass(frozen=True)
class _Fields:
    """The raw object and the checks on single fields; every message names file and field."""

    file: str
    raw: dict[str, Any]

    def invalid(self, field: str, what: str) -> AdapterInvalid:
        return AdapterInvalid(f"{self.file}: {field}: {what}")

    def check_known(self) -> None:
        kind = self.raw.get("peft_type")
        if not isinstance(kind, str):
            raise self.invalid("peft_type", f"a string is expected, found {show(kind)}")
        if kind != "LORA":
            raise AdapterUnsupported(f"{self.file}: peft_type {show(kind)} is not supported; LORA is")
        for field, value in self.raw.items():
            if not value or field in USED or field in HARMLESS:
                continue
            if field in REFUSED:
                raise AdapterUnsupported(f"{self.file}: {REFUSED[field]} is not supported ({field}={show(value)})")
            raise AdapterUnsupported(f"{self.file}: field {show(field)} is not known, is {show(value)}")
        bias = self.raw.get("bias", "none")
        if bias not in ("none", None):
            raise AdapterUnsupported(f"{self.file}: trained biases are not supported (bias={show(bias)})")

    def check_init(self) -> None:
        init = self.raw.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
            raise AdapterUnsupported(
                f"{self.file}: init_lora_weights={show(init)} is not supported: the adapter is relative to changed "
                "base weights; save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        if not any(init is known or (isinstance(init, str) and init.lower() == known) for known in KNOWN_INITS):
            raise AdapterUnsupported(f"{self.file}: init_lora_weights={show(init)} is not known")

    def rank(self, field: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self.invalid(field, f"a positive integer is expected, found {show(value)}")
        return value

    def alpha(self, field: str, value: Any) -> float:
        if type(value) not in (int, float) or abs(value) > 1e30 or value != value:
            raise self.invalid(field, f"a finite number is expected, found {show(value)}")
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.raw.get(field)
        if value not in (None, False, True) or not isinstance(value, bool | None):
            raise self.invalid(field, f"true or false is expected, found {show(value)}")
        return bool(value)

    def mapping(self, field: str) -> dict[str, Any]:
        value = self.raw.get(field)
        if not isinstance(value, dict | None):
            raise self.invalid(field, f"an object is expected, found {show(value)}")
        return value or {}

    def modules(self, field: str, required: bool = False) -> str | tuple[str, ...]:
        value = self.raw.get(field)
        if required and not value:
            raise self.invalid(field, f"a list of names or a regular expression is expected, found {show(value)}")
        if value is None:
            return ()
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.invalid(field, f"a string or a list of strings is expected, found {show(value)}")
        return tuple(value)

    def layers(self) -> frozenset[int] | None:
        value = self.raw.get("layers_to_transform")
        if value is None or value == []:
            return None
        values = value if isinstance(value, list) else [value]
        if not all(type(v) is int and v >= 0 for v in values):
            raise self.invalid(
                "layers_to_transform", f"an integer or a list of them is expected, found {show(value)}"
            )
        return frozenset(values)
