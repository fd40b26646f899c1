"""How long one step takes on a GPU, from what it reads and computes.

Each term is a physical quantity in seconds (bytes over the bandwidth, operations over the arithmetic) or a count of
layers, and has one coefficient, fitted to `bench/results` by `scripts/calibrate_planner.py`:

    seconds = weights read
            + 1.23 · KV read, + 2 · attention's products of new prompt tokens
            + a · layers                                       launches, norms, what is between kernels
            + b · weights read, if there is more than one row  matrix products of few rows
            + c · products of all tokens
            + d · layers, if any row has an adapter            LoRA's launches
            + e · adapters read
            + f · activations read and written for LoRA, of tokens with adapters
            + g · LoRA's products of new prompt tokens

The first two lines are not fitted, because all measured rows have short contexts: attention was measured alone to
read KV at 3.5 of 4.3 TB/s, and is taken to reach half of the arithmetic.

Of a mixture's experts, the weights are those that so many rows take, and routing takes a time of its own in each
layer. Ranks that share a model also sum: twice a layer, each time for a start and the bytes. Called by `planner.py`.
"""

import dataclasses
from dataclasses import dataclass, fields

from multilora.distributed.exchange import MOST_ROWS
from multilora.planner.facts import ModelFacts
from multilora.planner.gpus import GpuModel

KV_READ = 1.23
ATTENTION = 2.0
ROUTING = 3.0e-5
"""Seconds a layer of routing tokens to experts and sorting them: what one measured step (Qwen3-30B-A3B's dimensions,
64 rows, no adapters) takes beyond the other terms."""
SUM_START, SUM_START_NCCL, SUM_BYTES, SUM_BYTES_NCCL = 3.3e-6, 1.2e-5, 1.21e11, 5e10
"""Seconds until a sum over ranks begins, by our kernel for few rows and by NCCL, and bytes a second from there on:
what `bench.collectives` measured between two H200s, but for NCCL's bytes, of which steps with prompts reach less than
half as many."""
SHARED_LAYER = 1.1e-5
"""Seconds a layer that ranks wait for each other beyond that. This and NCCL's bytes were chosen by the rows of two
H200s (`scripts.calibrate_planner` lists their errors)."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """One step. decodes, prompt_tokens: rows; context: tokens of KV that decodes attend to, all together;
    prompt_context: the same of new prompt tokens; adapted_tokens: rows with an adapter; adapter_bytes: of the
    distinct adapters; adapted_prompt_ranks: sum over new prompt tokens of their adapter's rank."""

    decodes: int
    prompt_tokens: int
    context: int
    prompt_context: int = 0
    adapted_tokens: int = 0
    adapter_bytes: int = 0
    adapted_prompt_ranks: int = 0


@dataclass(frozen=True)
class StepCoefficients:
    """A number for each fitted term; those of layers are seconds, the others multiples of the hardware's limit."""

    layers: float
    rows: float
    products: float
    lora_layers: float
    lora_read: float
    lora_activations: float
    lora_products: float


CALIBRATED = StepCoefficients(
    layers=9.471e-06,
    rows=0.05154,
    products=1.021,
    lora_layers=2.205e-05,
    lora_read=1.17,
    lora_activations=0.729,
    lora_products=18.75,
)
"""Written by `python -m scripts.calibrate_planner --fit`, from the rows measured on the H200."""

TERMS = tuple(field.name for field in fields(StepCoefficients))


class StepModel:
    """The seconds of steps of one model on one GPU."""

    def __init__(self, facts: ModelFacts, gpu: GpuModel, coefficients: StepCoefficients = CALIBRATED):
        shape = facts.model.attention_shape
        self._coefficients: tuple[float, ...] = dataclasses.astuple(coefficients)
        self._read = gpu.read
        self._facts = facts
        self._weights_read = facts.read_bytes / gpu.read
        self._experts_read = facts.expert_bytes / gpu.read
        self._layers = float(facts.layers)
        self._row_bytes = facts.model.config.hidden_size * facts.model.config.dtype.itemsize
        self._token_products = 2 * facts.parameters / gpu.matmul
        self._token_kv = KV_READ * facts.layout.token_bytes / gpu.read
        self._attention = ATTENTION * 4 * facts.layers * shape.num_heads * shape.head_dim / gpu.matmul
        self._token_activations = facts.adapter_widths * 2 / gpu.read
        self._rank_products = 2 * facts.adapter_widths / gpu.matmul

    def fixed(self, load: StepLoad) -> float:
        """The seconds that no coefficient is fitted for."""
        rows = load.decodes + load.prompt_tokens
        layers = ROUTING * self._facts.expert_layers + self._sums(rows)
        return self._weights(rows) + self._token_kv * load.context + self._attention * load.prompt_context + layers

    def _weights(self, rows: int) -> float:
        """Reading them: all, but of the experts only those that some row takes."""
        return self._weights_read - self._experts_read * (1 - self._facts.experts_taken(rows))

    def _sums(self, rows: int) -> float:
        """Sums over ranks of all layers and of the embedding: a ring moves 2 · (n - 1) / n of the bytes."""
        ranks = self._facts.tp_size
        if ranks == 1:
            return 0.0
        few = rows <= MOST_ROWS.get(ranks, 0)
        start, speed = (SUM_START, SUM_BYTES) if few else (SUM_START_NCCL, SUM_BYTES_NCCL)
        moved = 2 * (ranks - 1) / ranks * rows * self._row_bytes
        layers = self._facts.layers
        return (2 * layers + 1) * (start + moved / speed) + layers * SHARED_LAYER

    def terms(self, load: StepLoad) -> tuple[float, ...]:
        """The quantities of `TERMS`, in its order."""
        rows = load.decodes + load.prompt_tokens
        return (
            self._layers,
            self._weights(rows) if rows > 1 else 0.0,
            self._token_products * rows,
            self._layers if load.adapted_tokens else 0.0,
            load.adapter_bytes / self._read,
            load.adapted_tokens * self._token_activations,
            load.adapted_prompt_ranks * self._rank_products,
        )

    def seconds(self, load: StepLoad) -> float:
        """Seconds of one step."""
        fitted: float = sum(c * term for c, term in zip(self._coefficients, self.terms(load), strict=True))
        return self.fixed(load) + fitted
