"""The fields of `adapter_config.json`: which there may be, and what each may hold.

It owns the three lists of fields: used, harmless at inference, refused. A field in none of them is refused unless it
is null, false or empty, so that nothing which changes the arithmetic is ever ignored. Called by `config.py`.
"""

from dataclasses import dataclass
from typing import Any

from multilora.adapters.sources.files import show
from multilora.errors import AdapterInvalid, AdapterUnsupported
from multilora.lora.sites import EMBED

# fmt: off
USED = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "lora_bias", "use_dora",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "alora_invocation_tokens", "velora_config",
    "target_parameters",
))
HARMLESS = frozenset((
    # the adapter's origin
    "auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type",
    # training only; their effect is in the weights and in rank_pattern
    "inference_mode", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # settings of PEFT's own run time
    "runtime_config", "ephemeral_gpu_offload", "merge_weights", "megatron_core",
    # PEFT itself sets it to false for every nn.Linear; lora_A and lora_B are stored the same way
    "fan_in_fan_out",
    # means something only with use_qalora
    "qalora_group_size",
))
# fmt: on
REFUSED = {
    "layer_replication": "layer_replication (a model with repeated layers)",
    "alora_invocation_string": "activated LoRA by alora_invocation_string (current PEFT: alora_invocation_tokens)",
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
BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True)
class Fields:
    """The raw JSON object, and the checks of single fields. All raise AdapterInvalid naming file and field."""

    file: str
    raw: dict[str, Any]

    def invalid(self, field: str, what: str) -> AdapterInvalid:
        return AdapterInvalid(f"{self.file}: {field}: {what}")

    def check_known(self) -> None:
        """Refuse what is no LoRA, and fields that are refused or unknown. Raises AdapterUnsupported."""
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

    def check_init(self) -> None:
        """Refuse initialisations that change the base weights, and unknown ones. Raises AdapterUnsupported."""
        init = self.raw.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
            raise AdapterUnsupported(
                f"{self.file}: init_lora_weights={show(init)} is not supported: the adapter is relative to changed "
                "base weights; save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        if not any(init is known or (isinstance(init, str) and init.lower() == known) for known in KNOWN_INITS):
            raise AdapterUnsupported(f"{self.file}: init_lora_weights={show(init)} is not known")

    def rank(self, field: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value < 1 << 31:
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

    def bias(self) -> str:
        value = self.raw.get("bias")
        if value is None:
            return "none"
        if not isinstance(value, str) or value not in BIASES:
            raise self.invalid("bias", f"one of {', '.join(BIASES)} is expected, found {show(value)}")
        return value

    def mapping(self, field: str) -> dict[str, Any]:
        value = self.raw.get(field)
        if not isinstance(value, dict | None):
            raise self.invalid(field, f"an object is expected, found {show(value)}")
        return value or {}

    def modules(self, field: str, required: bool = False) -> str | tuple[str, ...]:
        value = self.raw.get(field)
        if required and not value:
            raise self.invalid(field, f"a list of names or a regular expression is expected, found {show(value)}")
        return value if isinstance(value, str) else self.names(field)

    def names(self, field: str) -> tuple[str, ...]:
        value = self.raw.get(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.invalid(field, f"a list of strings is expected, found {show(value)}")
        return tuple(value)

    def layers(self) -> frozenset[int] | None:
        value = self.raw.get("layers_to_transform")
        if value is None or value == []:
            return None
        values = value if isinstance(value, list) else [value]
        return frozenset(self.integers("layers_to_transform", values))

    def integers(self, field: str, values: Any) -> tuple[int, ...]:
        """A list of integers, none of them negative."""
        if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
            raise self.invalid(field, f"a list of integers, none below 0, is expected, found {show(values)}")
        return tuple(values)

    def token_indices(self) -> dict[str, tuple[int, ...]] | None:
        """Module → ids, in the file's order; None if there are none. A bare list is about the token embedding."""
        value = self.raw.get("trainable_token_indices")
        if not value:
            return None
        by_module = value if isinstance(value, dict) else {EMBED: value}
        found = {}
        for module, ids in by_module.items():
            field = f"trainable_token_indices[{show(module)}]" if value is by_module else "trainable_token_indices"
            found[module] = self.integers(field, ids)
            if len(set(found[module])) != len(found[module]):
                raise self.invalid(field, "a token is given twice")
        return found
