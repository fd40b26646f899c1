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
read KV at 3.5 of 4.3 TB/s, and is taken to reach half of the arithmetic. Called by `planner.py`.
"""

import dataclasses
from dataclasses import dataclass, fields

from multilora.planner.facts import ModelFacts
from multilora.planner.gpus import GpuModel

KV_READ = 1.23
ATTENTION = 2.0


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
        self._weights = facts.read_bytes / gpu.read
        self._layers = float(facts.layers)
        self._token_products = 2 * facts.parameters / gpu.matmul
        self._token_kv = KV_READ * facts.layout.token_bytes / gpu.read
        self._attention = ATTENTION * 4 * facts.layers * shape.num_heads * shape.head_dim / gpu.matmul
        self._token_activations = facts.adapter_widths * 2 / gpu.read
        self._rank_products = 2 * facts.adapter_widths / gpu.matmul

    def fixed(self, load: StepLoad) -> float:
        """The seconds that no coefficient is fitted for."""
        return self._weights + self._token_kv * load.context + self._attention * load.prompt_context

    def terms(self, load: StepLoad) -> tuple[float, ...]:
        """The quantities of `TERMS`, in its order."""
        rows = load.decodes + load.prompt_tokens
        return (
            self._layers,
            self._weights if rows > 1 else 0.0,
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
