"""One adapter for each thing that PEFT can save: made, trained a little and saved by PEFT itself.

`ROWS` is the parity table: what is served, and what is refused in which words. Used by the reader's tests, by the
engine's and by the script that writes the table into the documentation.
"""

import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from fakes.models import TINY_SIZES, make_adapter, make_tiny_model, train_randomly
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SEVEN = ATTENTION + MLP
INVOCATION = [17, 23, 5]
ADDED = (101, 103, 102)

# name → family of `fakes.models`, changes of its sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, tied": ("llama", {"tie_word_embeddings": True}),
    "Qwen2": ("qwen2", {}),  # q, k and v have a bias
    "Qwen3": ("qwen3", {}),  # q and k have norms
}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """What is special about one adapter.

    config: of LoraConfig; save: of save_pretrained; prepare: changes the base model before; kind: PEFT's config
    class; edit: fields written into adapter_config.json afterwards; rewrite: changes the saved directory; convert:
    saved as plain LoRA relative to the original base model. refused: what the error says, None if it is served.
    """

    feature: str
    config: dict[str, Any] = field(default_factory=dict)
    model: str = "Llama"
    dtype: str = "float32"
    save: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] | None = None
    kind: str = "LoraConfig"
    edit: dict[str, Any] = field(default_factory=dict)
    rewrite: Callable[[Path], None] | None = None
    convert: bool = False
    refused: str | None = None
    prompt: tuple[int, ...] = ()  # how the prompts begin
    added: int = 0  # tokens, to the base model's; below 0: taken away

    def make(self, path: Path, model_path: Path) -> None:
        """Let PEFT write the adapter to directory `path`."""
        config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | self.config
        if self.convert:
            make_converted(path, model_path, config)
        elif self.kind != "LoraConfig":
            make_other(path, model_path, self.kind, self.config)
        else:
            make_adapter(path, model_path, seed=3, dtype=self.dtype, prepare=self._prepare, save=self.save, **config)

    def _prepare(self, model: Any) -> None:
        add_tokens(model, self.added)
        if self.prepare is not None:
            self.prepare(model)

    def alter(self, path: Path) -> None:
        """Make the directory what is to be served; PEFT itself may not be able to load it any more."""
        if self.edit:
            file = path / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | self.edit))
        if self.rewrite is not None:
            self.rewrite(path)

    def loaded(self, path: Path, model_path: Path) -> Any:
        """PEFT's model with the adapter loaded from its directory."""
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        add_tokens(base, self.added)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peft.PeftModel.from_pretrained(base, str(path)).float().eval()

    def prompts(self, count: int, length: int = 9) -> list[list[int]]:
        rng = random.Random(len(self.feature))
        vocab = TINY_SIZES["vocab_size"] + min(0, self.added)
        tails = [[rng.randrange(3, vocab) for _ in range(length)] for _ in range(count)]
        return [[*self.prompt, *tail] for tail in tails]


class Lab:
    """Models and adapters made in `root` when they are first asked for. sizes: fields of every model's config."""

    def __init__(self, root: Path, **sizes: Any):
        self._root = root
        self._sizes = sizes
        self._adapters: dict[str, tuple[Path, Any]] = {}

    def model(self, name: str) -> Path:
        path = self._root / name
        if not path.exists():
            family, sizes = MODELS[name]
            make_tiny_model(path, family, seed=11, **(self._sizes | sizes))
        return path

    def adapter(self, row: Row) -> Path:
        return self._made(row)[0]

    def reference(self, row: Row) -> Any:
        """PEFT's model with the row's adapter, as it was loaded from what PEFT had saved."""
        return self._made(row)[1]

    def _made(self, row: Row) -> tuple[Path, Any]:
        if row.feature not in self._adapters:
            path, model = self._root / f"adapter {len(self._adapters)}", self.model(row.model)
            row.make(path, model)
            reference = row.loaded(path, model) if row.refused is None else None
            row.alter(path)
            self._adapters[row.feature] = (path, reference)
        return self._adapters[row.feature]


def make_converted(path: Path, model_path: Path, config: dict[str, Any]) -> None:
    """As PEFT's documentation tells: the untrained adapter is saved first, and what is saved is the difference."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    before = path.with_name(f"{path.name} before")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        settings = peft.LoraConfig(**config)
        if config["init_lora_weights"] == "corda":
            add_eigens(base, settings.r)
        model = peft.get_peft_model(base, settings, autocast_adapter_dtype=False)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(before))
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data += 0.1 * torch.randn_like(weight)
        model.save_pretrained(str(path), path_initial_model_for_weight_conversion=str(before))


def add_eigens(model: Any, rank: int) -> None:
    """What PEFT's `preprocess_corda` leaves on the layers, of a covariance that is the unit matrix."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            u, s, v = torch.linalg.svd(module.weight.data, full_matrices=False)
            module.eigens = SimpleNamespace(U_WC=u[:, :rank], S_WC=s[:rank], V_WC=v[:rank].T)


def make_other(path: Path, model_path: Path, kind: str, config: dict[str, Any]) -> None:
    """An adapter of another of PEFT's methods."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        model = peft.get_peft_model(base, getattr(peft, kind)(**config), autocast_adapter_dtype=False)
        train_randomly(model)
        model.save_pretrained(str(path))


def stray_tables(model: Any) -> None:
    """As if the embeddings had been trained before, on the whole."""
    model.get_input_embeddings().weight.data += 0.1 * torch.randn_like(model.get_input_embeddings().weight)
    if not model.config.tie_word_embeddings:
        model.get_output_embeddings().weight.data += 0.1 * torch.randn_like(model.get_output_embeddings().weight)


def add_tokens(model: Any, count: int) -> None:
    if count:
        model.resize_token_embeddings(TINY_SIZES["vocab_size"] + count, mean_resizing=False)


def shard(path: Path) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    shards = {f"adapter_model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


def renamed(*changes: tuple[str, str]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path / "adapter_model.safetensors")
        for old, new in changes:
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        save_file(tensors, path / "adapter_model.safetensors")

    return rewrite


TIED, QWEN2, QWEN3 = "Llama, tied", "Qwen2", "Qwen3"
DORA = {"use_dora": True}
ROWS = [
    Row("`r`, `lora_alpha`", {"r": 8, "lora_alpha": 20, "target_modules": SEVEN}),
    Row("rsLoRA (`use_rslora`)", {"r": 16, "lora_alpha": 7, "use_rslora": True}),
    Row(
        "`rank_pattern`, `alpha_pattern`, keys as regular expressions too",
        {
            "target_modules": SEVEN,
            "rank_pattern": {"1.mlp.up_proj": 7, r"layers\.[01]\.self_attn\..*": 5},
            "alpha_pattern": {r".*\.1\.mlp\.gate_proj": 0.5, "self_attn.(q|v)_proj": 11},
        },
    ),
    Row("`target_modules` as a list of suffixes and full names", {"target_modules": ["0.mlp.up_proj", "o_proj"]}),
    Row("`target_modules` as a regular expression", {"target_modules": r"model\.layers\.1\..*(q_proj|up_proj)"}),
    Row('`target_modules` "all-linear"', {"target_modules": "all-linear"}),
    Row("`exclude_modules`", {"target_modules": "all-linear", "exclude_modules": r".*\.1\.mlp\..*"}),
    Row("`layers_to_transform`, `layers_pattern`", {"layers_to_transform": [1], "layers_pattern": "layers"}),
    Row("`fan_in_fan_out`", {"fan_in_fan_out": True}),
    Row("a file in float16", {}, dtype="float16"),
    Row("a file in bfloat16", {}, dtype="bfloat16"),
    Row("several files with an index", {}, rewrite=shard),
    Row("tensor names without `base_model.model.`", {}, rewrite=renamed(("base_model.model.", ""))),
    Row('`bias` "lora_only"', {"bias": "lora_only"}, QWEN2),
    Row('`bias` "all"', {"bias": "all"}, QWEN2),
    Row("`lora_bias`", {"lora_bias": True, "target_modules": SEVEN}),
    Row('`lora_bias` and `bias` "all"', {"lora_bias": True, "bias": "all"}, QWEN2),
    Row("DoRA (`use_dora`)", DORA | {"target_modules": SEVEN}),
    Row("DoRA, rsLoRA, `rank_pattern`", DORA | {"use_rslora": True, "rank_pattern": {"v_proj": 9}}, QWEN3),
    Row('DoRA and `bias` "all"', DORA | {"bias": "all"}, QWEN2),
    Row("DoRA on `lm_head`", DORA | {"target_modules": ["q_proj", "lm_head"]}),
    Row(
        "DoRA on `embed_tokens`",
        DORA | {"target_modules": ["q_proj", "embed_tokens"]},
        refused="DoRA on the token embedding is not supported",
    ),
    Row("`modules_to_save`: `lm_head`", {"modules_to_save": ["lm_head"]}),
    Row("`modules_to_save`: `lm_head`, tied", {"modules_to_save": ["lm_head"]}, TIED),
    Row("`modules_to_save`: `embed_tokens`", {"modules_to_save": ["embed_tokens"]}),
    Row("`modules_to_save`: `embed_tokens`, tied", {"modules_to_save": ["embed_tokens"]}, TIED),
    Row(
        "`modules_to_save`: `embed_tokens`, tied, `ensure_weight_tying`",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        TIED,
    ),
    Row("`modules_to_save`: norms", {"modules_to_save": ["norm"]}, QWEN3),
    Row("`modules_to_save`: a linear layer with its bias", {"modules_to_save": ["k_proj", "o_proj"]}, QWEN2),
    Row("`modules_to_save`: the whole MLP", {"modules_to_save": ["mlp"], "target_modules": ATTENTION}),
    Row("LoRA on `embed_tokens`", {"target_modules": ["embed_tokens", "v_proj"]}),
    Row("LoRA on `embed_tokens`, tied", {"target_modules": ["embed_tokens", "v_proj"]}, TIED),
    Row("LoRA on `lm_head`", {"target_modules": ["lm_head", "v_proj"]}),
    Row("LoRA on `lm_head`, tied", {"target_modules": ["lm_head", "v_proj"]}, TIED),
    Row(
        "LoRA on `embed_tokens` and `lm_head`, tied, `ensure_weight_tying`",
        {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
        TIED,
    ),
    Row("LoRA on `lm_head` with `lora_bias`", {"target_modules": ["lm_head"], "lora_bias": True}),
    Row("`trainable_token_indices`", {"trainable_token_indices": [40, 7, 3]}, prompt=(7, 40)),
    Row("`trainable_token_indices`, tied", {"trainable_token_indices": [40, 7, 3]}, TIED, prompt=(7, 40)),
    Row(
        "`trainable_token_indices` by module",
        {"trainable_token_indices": {"embed_tokens": [40, 7], "lm_head": [20, 3, 50]}},
        prompt=(7, 40),
    ),
    Row(
        "`trainable_token_indices` by module, tied",
        {"trainable_token_indices": {"embed_tokens": [40, 7], "lm_head": [20, 3, 50]}},
        TIED,
        prompt=(7, 40),
    ),
    Row(
        "`trainable_token_indices` and LoRA on `lm_head`, tied",
        {"trainable_token_indices": [40, 7, 3], "target_modules": ["lm_head", "q_proj"]},
        TIED,
        prompt=(7, 40),
    ),
    Row("`save_embedding_layers`, tables as in the base model", {}, save={"save_embedding_layers": True}),
    Row(
        "`save_embedding_layers` under LoRA on `lm_head`, tables as in the base model",
        {"target_modules": ["lm_head", "q_proj"]},
        save={"save_embedding_layers": True},
    ),
    Row(
        "`save_embedding_layers` under LoRA on both tables, other tables",
        {"target_modules": ["embed_tokens", "lm_head"]},
        save={"save_embedding_layers": True},
        prepare=stray_tables,
    ),
    Row(
        "`save_embedding_layers`, another table, tied",
        {},
        TIED,
        save={"save_embedding_layers": True},
        prepare=stray_tables,
    ),
    Row(
        "`save_embedding_layers` with `trainable_token_indices`, another table, tied",
        {"trainable_token_indices": [40, 7, 3]},
        TIED,
        save={"save_embedding_layers": True},
        prepare=stray_tables,
        prompt=(7, 40),
    ),
    Row(
        "`save_embedding_layers` with `modules_to_save`, other tables",
        {"modules_to_save": ["embed_tokens"]},
        save={"save_embedding_layers": True},
        prepare=stray_tables,
    ),
    Row("added tokens", prompt=ADDED, added=3),
    Row("added tokens, tied", {}, TIED, prompt=ADDED, added=3),
    Row(
        "added tokens, `modules_to_save`",
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        prompt=ADDED,
        added=3,
    ),
    Row(
        "added tokens, `modules_to_save` and nothing else, tied",
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        TIED,
        save={"save_embedding_layers": False},
        prompt=ADDED,
        added=3,
    ),
    Row("fewer tokens", added=-11),
    Row("fewer tokens, tied", {}, TIED, added=-11),
    Row(
        "added tokens, `modules_to_save`: `embed_tokens`, tied",
        {"modules_to_save": ["embed_tokens"]},
        TIED,
        prompt=ADDED,
        added=3,
    ),
    Row(
        "added tokens, `trainable_token_indices`", {"trainable_token_indices": [103, 7]}, prompt=(7, *ADDED), added=3
    ),
    Row(
        "added tokens, `trainable_token_indices`, tied",
        {"trainable_token_indices": [103, 7]},
        TIED,
        prompt=(7, *ADDED),
        added=3,
    ),
    Row(
        "added tokens, LoRA on `embed_tokens` and `lm_head`",
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        prompt=ADDED,
        added=3,
    ),
    Row(
        "added tokens, LoRA on `embed_tokens`, `lm_head` not saved",
        {"target_modules": ["embed_tokens", "q_proj"]},
        added=3,
        refused="embed_tokens has 104 rows in the adapter, 101 in the base model",
    ),
    Row(
        "added tokens, `modules_to_save`: `embed_tokens`, tied, `lm_head` not saved",
        {"modules_to_save": ["embed_tokens"]},
        TIED,
        save={"save_embedding_layers": False},
        added=3,
        refused="embed_tokens has 104 rows in the adapter, 101 in the base model",
    ),
    Row(
        "added tokens, `trainable_token_indices`, tables not saved",
        {"trainable_token_indices": [7, 102]},
        save={"save_embedding_layers": False},
        added=3,
        refused="token 102 is beyond the vocabulary of 101",
    ),
    Row("PiSSA, converted when saved", {"init_lora_weights": "pissa"}, convert=True),
    Row("PiSSA by `pissa_niter_4`, converted when saved", {"init_lora_weights": "pissa_niter_4"}, convert=True),
    Row("OLoRA, converted when saved", {"init_lora_weights": "olora", "use_rslora": True}, convert=True),
    Row(
        "CorDA, converted when saved",
        {"init_lora_weights": "corda", "corda_config": {}},
        convert=True,
    ),
    Row(
        "PiSSA as trained", edit={"init_lora_weights": "pissa"}, refused="init_lora_weights='pissa' is not supported"
    ),
    Row(
        "OLoRA as trained", edit={"init_lora_weights": "olora"}, refused="init_lora_weights='olora' is not supported"
    ),
    Row(
        "CorDA as trained", edit={"init_lora_weights": "corda"}, refused="init_lora_weights='corda' is not supported"
    ),
    Row(
        "LoftQ as trained", edit={"init_lora_weights": "loftq"}, refused="init_lora_weights='loftq' is not supported"
    ),
    Row("EVA", {"init_lora_weights": "eva"}),
    Row('`init_lora_weights` "gaussian"', {"init_lora_weights": "gaussian"}),
    Row('`init_lora_weights` "orthogonal"', {"init_lora_weights": "orthogonal"}),
    Row("MiCA", {"init_lora_weights": "mica"}),
    Row("VeLoRA", {"velora_config": {"num_groups": 4}}),
    Row(
        "activated LoRA (`alora_invocation_tokens`)",
        {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"},
        prompt=(9, 30, *INVOCATION),
    ),
    Row(
        "activated LoRA with `modules_to_save`",
        {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM", "modules_to_save": ["norm"]},
        refused="activated LoRA (alora_invocation_tokens) with a trained norm beside LoRA",
    ),
    Row(
        "`layer_replication`",
        {"layer_replication": [[0, 2], [1, 2]]},
        refused="layer_replication (a model with repeated layers) is not supported",
    ),
    Row("`target_parameters`", {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}),
    Row(
        "`target_parameters` with DoRA",
        edit={"target_parameters": ["mlp.up_proj.weight"], "use_dora": True},
        refused="target_parameters: cannot be combined with use_dora",
    ),
    Row("QALoRA", edit={"use_qalora": True}, refused="QALoRA is not supported"),
    Row(
        "block-diagonal LoRA",
        edit={"use_bdlora": {"nblocks": 2}},
        refused="block-diagonal LoRA (use_bdlora) is not supported",
    ),
    Row("Arrow", edit={"arrow_config": {"top_k": 2}}, refused="Arrow routing (arrow_config) is not supported"),
    Row("KaSA", {"kasa_config": {"beta": 1e-4}}, refused="KaSA (kasa_config) is not supported"),
    Row(
        "MonteCLoRA",
        edit={"monteclora_config": {"num_samples": 2}},
        refused="MonteCLoRA (monteclora_config) is not supported",
    ),
    Row(
        "Megatron layers",
        edit={"megatron_config": {"a": 1}},
        refused="Megatron layers (megatron_config) is not supported",
    ),
    Row(
        "VeRA",
        {"r": 4, "target_modules": ["q_proj"]},
        kind="VeraConfig",
        refused="peft_type 'VERA' is not supported; LORA is",
    ),
    Row(
        "LoHa",
        {"r": 4, "target_modules": ["q_proj"]},
        kind="LoHaConfig",
        refused="peft_type 'LOHA' is not supported; LORA is",
    ),
    Row(
        "LoKr",
        {"r": 4, "target_modules": ["q_proj"]},
        kind="LoKrConfig",
        refused="peft_type 'LOKR' is not supported; LORA is",
    ),
]
