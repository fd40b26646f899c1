"""How large everything is: the model, its adapters, the workloads; and the files that stand for them.

Weights of the model are never written (the engine makes random ones); those of an adapter are, each with random
numbers of its own. Called by every other file of this package.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BY_INPUTS = ("o_proj", "down_proj")
"""Modules that ranks cut by their inputs; the others are cut by outputs."""


@dataclass(frozen=True)
class Dims:
    """The dimensions of a Llama in bf16. Where `ranks` is asked for, a figure is that of one of so many ranks."""

    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Name → (in, out), for all modules that adapters act on."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, q),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (q, self.hidden),
            "mlp.gate_proj": (self.hidden, self.inter),
            "mlp.up_proj": (self.hidden, self.inter),
            "mlp.down_proj": (self.inter, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """Parameters in the matrices of all layers."""
        return self.layers * sum(a * b for a, b in self.modules.values())

    def kv_bytes(self, ranks: int = 1) -> int:
        """Bytes of the keys and values of one token. KV heads fewer than ranks are held more than once."""
        return 2 * self.layers * 2 * max(1, self.kv_heads // ranks) * self.head_dim

    def adapter_bytes(self, rank: int, ranks: int = 1) -> float:
        """A is whole where the module is cut by outputs, B where it is cut by inputs."""
        numbers = sum(
            a / ranks + b if module.endswith(BY_INPUTS) else a + b / ranks for module, (a, b) in self.modules.items()
        )
        return 2 * self.layers * rank * numbers

    def step_bytes(
        self,
        batch: int,
        context: float,
        adapters: list[int],
        ranks: int = 1,
        *,
        weight_bits: float = 16,
        kv_bits: int = 16,
    ) -> float:
        """What a decode step must read: the matrices, the KV of `batch` requests, one adapter of each of the LoRA
        ranks `adapters`. weight_bits: of a number in the matrices of layers; the head's have 16."""
        matrices = (self.parameters * weight_bits / 8 + 2 * self.hidden * self.vocab) / ranks
        kv = batch * context * self.kv_bytes(ranks) * kv_bits / 16
        return matrices + kv + sum(self.adapter_bytes(rank, ranks) for rank in adapters)


@dataclass(frozen=True)
class MoeDims(Dims):
    """The same of a Qwen3-MoE; inter is that of one expert, and `modules` are those of attention alone."""

    experts: int
    top_k: int

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        return {name: size for name, size in super().modules.items() if name.startswith("self_attn.")}

    @property
    def expert_modules(self) -> dict[str, tuple[int, int]]:
        """Name → (in, out) of one expert, in the order in which PEFT wraps the parameters."""
        return {"gate_up_proj": (self.hidden, 2 * self.inter), "down_proj": (self.inter, self.hidden)}

    @property
    def expert_parameters(self) -> int:
        """Parameters in the matrices of one expert of all layers."""
        return self.layers * sum(a * b for a, b in self.expert_modules.values())

    @property
    def parameters(self) -> int:
        """Attention, the routers and all experts."""
        routers = self.layers * self.hidden * self.experts
        return super().parameters + routers + self.experts * self.expert_parameters

    def step_bytes(
        self,
        batch: int,
        context: float,
        adapters: list[int],
        ranks: int = 1,
        *,
        weight_bits: float = 16,
        kv_bits: int = 16,
    ) -> float:
        """Experts that no row takes are not read; rows take theirs as random weights have it, all equally often.
        Experts have 8 bits where the others do, else 16."""
        taken = self.experts * (1 - (1 - self.top_k / self.experts) ** batch)
        of_experts = taken * (1 if weight_bits == 8 else 2) - self.experts * weight_bits / 8
        rest = super().step_bytes(batch, context, adapters, ranks, weight_bits=weight_bits, kv_bits=kv_bits)
        return rest + of_experts * self.expert_parameters / ranks

    def expert_adapter_bytes(self, rank: int, rows: int) -> float:
        """What `rows` rows read of an adapter on all experts."""
        taken = self.experts * (1 - (1 - self.top_k / self.experts) ** rows)
        return 2 * self.layers * rank * taken * sum(a + b for a, b in self.expert_modules.values())


@dataclass(frozen=True)
class Work:
    """How much is measured. Prompts and answers in tokens."""

    adapters: int = 64  # of each group
    batches: tuple[int, ...] = (1, 8, 32, 64)
    decode_prompt: int = 128
    decode_steps: int = 64
    repeats: int = 3
    requests: int = 256
    prompt: int = 512
    answer: int = 128
    slots: int = 8  # adapters that the small device tier holds
    many: int = 1000
    many_device_bytes: int = 8 << 30
    cold_runs: int = 5
    streams: int = 32
    arrivals: int = 100
    arrival_rate: float = 10.0  # a second
    arrival_rounds: int = 3
    arrival_answer: int = 32
    swap_seconds: float = 12.0
    fresh: int = 1000
    fresh_seconds: float = 150.0
    fresh_ranks: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    long_prompts: tuple[int, ...] = (2048, 32768)
    contexts: tuple[tuple[int, int], ...] = ((16, 8192), (4, 32768))  # requests, tokens of each
    shared: tuple[int, int] = (4096, 16)  # tokens that all prompts begin with, and own ones of each
    large_batches: tuple[int, ...] = (128, 256)
    slora: tuple[int, int] = (5, 2000)  # adapters, few and many
    slora_requests: int = 512
    slora_lengths: tuple[int, int] = (8, 512)  # of prompts and of answers

    @property
    def longest(self) -> int:
        """Tokens of the longest request of any row."""
        longest = max(*self.long_prompts, *(length for _, length in self.contexts))
        return longest + 1024

    @property
    def batch(self) -> int:
        """The largest batch: --max-running-requests."""
        return self.batches[-1]

    @property
    def longest_decode(self) -> int:
        """Tokens of the longest request in the decode rows, with room for a page that is not full."""
        return self.decode_prompt + 2 * self.decode_steps + 32

    def ranks(self, group: str) -> list[int]:
        """The ranks of the adapters of a group, `r16` or `mixed`. Its adapter i is named {group}-{i}."""
        return ([16] * 4 if group == "r16" else [8, 16, 32, 64]) * (self.adapters // 4)


TINY = Work(
    adapters=8,
    batches=(1, 2, 4, 8),
    decode_prompt=8,
    decode_steps=8,
    repeats=2,
    requests=16,
    prompt=24,
    answer=4,
    slots=4,
    many=20,
    many_device_bytes=1 << 20,
    cold_runs=2,
    streams=4,
    arrivals=8,
    arrival_rate=50.0,
    arrival_rounds=2,
    arrival_answer=3,
    swap_seconds=0.5,
    fresh=20,
    fresh_seconds=10.0,
    fresh_ranks=(8, 16),
    long_prompts=(32, 200),
    contexts=((2, 100), (1, 300)),
    shared=(64, 4),
    large_batches=(8, 12),
    slora=(3, 12),
    slora_requests=16,
    slora_lengths=(4, 12),
)
"""What a test can run on a CPU."""

SIZES: dict[str, tuple[Dims, Work]] = {
    "llama-8b": (Dims(4096, 14336, 32, 32, 8, 128, 128256, 8192), Work()),
    "llama-70b": (Dims(8192, 28672, 80, 64, 8, 128, 128256, 8192), Work()),
    "qwen3-30b-a3b": (MoeDims(2048, 768, 48, 32, 4, 128, 151936, 8192, experts=128, top_k=8), Work()),
    "tiny-moe": (MoeDims(64, 32, 2, 4, 2, 16, 101, 1024, experts=6, top_k=2), TINY),
    "tiny": (Dims(64, 96, 2, 4, 2, 16, 101, 1024), TINY),
}
"""By --dims: Llama-3.1-8B's, for which there are targets, the 70B model's, Qwen3-30B-A3B's, and two that a test can
run on a CPU."""


def write_model(path: Path, dims: Dims, longest: int = 0) -> str:
    """A configuration without weights. longest: tokens of a request, where it is more than the dimensions have."""
    path.mkdir()
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dims.hidden,
        "intermediate_size": dims.inter,
        "num_hidden_layers": dims.layers,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab,
        "max_position_embeddings": max(dims.context, longest),
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if isinstance(dims, MoeDims):
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": dims.experts,
            "num_experts_per_tok": dims.top_k,
            "moe_intermediate_size": dims.inter,
            "norm_topk_prob": True,
        }
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


class Adapters:
    """Writes adapters as PEFT would, with all weights different, as fast as the disk takes them: a file is a header
    and one block of random numbers from the device."""

    def __init__(self, directory: Path, dims: Dims, device: torch.device):
        self._directory = directory
        self._dims = dims
        self._device = device

    def write_all(self, ranks: dict[str, int]) -> dict[str, str]:
        """Name → rank in, name → path out."""
        with ThreadPoolExecutor(4) as threads:
            return dict(zip(ranks, threads.map(self.write, ranks, ranks.values()), strict=True))

    def write(self, name: str, rank: int) -> str:
        path = self._directory / name
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(self.config(rank)))
        header = self._header(rank)
        weights = self._random(name, rank)
        with (path / "adapter_model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(weights.view(torch.uint8).cpu().numpy().data)
        return str(path)

    def config(self, rank: int) -> dict[str, Any]:
        """What adapter_config.json holds."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": [module.partition(".")[2] for module in self._modules],
            "bias": "none",
        }

    def tensors(self, name: str, rank: int) -> dict[str, torch.Tensor]:
        """The same weights as `write` writes, on the device, as a trainer has them."""
        shapes = self._shapes(rank)
        parts = self._random(name, rank).split([rows * columns for rows, columns in shapes.values()])
        return {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}

    def _random(self, name: str, rank: int) -> torch.Tensor:
        seed = int.from_bytes(name.encode()) % (1 << 62)
        random = torch.Generator(self._device).manual_seed(seed)
        count = sum(rows * columns for rows, columns in self._shapes(rank).values())
        return torch.randn(count, generator=random, device=self._device, dtype=torch.bfloat16) * 0.01

    def _shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        """Name → shape of each tensor, in the order of the file."""
        return {
            f"base_model.model.model.layers.{layer}.{module}.{half}.weight": shape
            for layer in range(self._dims.layers)
            for module, (width, out) in self._modules.items()
            for half, shape in (("lora_A", (rank, width)), ("lora_B", (out, rank)))
        }

    @property
    def _modules(self) -> dict[str, tuple[int, int]]:
        """Name → (in, out), for the modules that these adapters act on."""
        return self._dims.modules

    def _header(self, rank: int) -> bytes:
        """The header of a safetensors file that holds one tensor after the other."""
        tensors, offset = {}, 0
        for name, shape in self._shapes(rank).items():
            end = offset + 2 * shape[0] * shape[1]
            tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(tensors).encode()
        return text + b" " * (-len(text) % 8)


class AttentionAdapters(Adapters):
    """The same on the projections of attention alone, as S-LoRA's are."""

    @property
    def _modules(self) -> dict[str, tuple[int, int]]:
        return {name: size for name, size in super()._modules.items() if name.startswith("self_attn.")}


class ExpertAdapters(Adapters):
    """The same on all experts, as PEFT writes adapters on the parameters in which transformers stacks them."""

    def __init__(self, directory: Path, dims: MoeDims, device: torch.device):
        super().__init__(directory, dims, device)
        self._moe = dims

    def config(self, rank: int) -> dict[str, Any]:
        parameters = [f"mlp.experts.{name}" for name in self._moe.expert_modules]
        return super().config(rank) | {"target_modules": [], "target_parameters": parameters}

    def _shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        wrappers, stacked = ("experts.base_layer", "experts"), self._moe.experts * rank
        return {
            f"base_model.model.model.layers.{layer}.mlp.{wrapper}.{half}.weight": shape
            for layer in range(self._moe.layers)
            for wrapper, (width, out) in zip(wrappers, self._moe.expert_modules.values(), strict=True)
            for half, shape in (("lora_A", (stacked, width)), ("lora_B", (out, stacked)))
        }
