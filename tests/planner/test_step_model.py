"""The step-cost model: what each term counts. How far it is from what was measured: tests/scripts."""

from dataclasses import replace

import pytest

from multilora.planner.gpus import GPUS
from multilora.planner.step_model import CALIBRATED, TERMS, StepCoefficients, StepLoad, StepModel
from scripts.calibrate_planner import llama

H200 = GPUS["h200"]
NOTHING = StepCoefficients(*[0.0] * len(TERMS))
ONE = StepLoad(1, 0, 100)


def test_a_lonely_row_reads_all_weights():
    model = StepModel(llama(), H200, NOTHING)
    assert model.seconds(replace(ONE, context=0)) == pytest.approx(llama().read_bytes / H200.read)
    assert model.seconds(ONE) > model.seconds(replace(ONE, context=0))


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("layers", ONE),
        ("rows", StepLoad(2, 0, 200)),
        ("products", ONE),
        ("lora_layers", replace(ONE, adapted_tokens=1)),
        ("lora_read", replace(ONE, adapter_bytes=1 << 20)),
        ("lora_activations", replace(ONE, adapted_tokens=1)),
        ("lora_products", StepLoad(0, 10, 0, adapted_prompt_ranks=160)),
    ],
)
def test_each_coefficient_multiplies_its_term(name, load):
    term = dict(zip(TERMS, StepModel(llama(), H200).terms(load), strict=True))[name]
    with_it = StepModel(llama(), H200, replace(NOTHING, **{name: 3.0}))
    assert term > 0
    assert with_it.seconds(load) - StepModel(llama(), H200, NOTHING).seconds(load) == pytest.approx(3 * term)


def test_more_work_takes_longer():
    model = StepModel(llama(), H200)
    base = StepLoad(32, 0, 32 * 200)
    for change in (
        {"decodes": 33},
        {"prompt_tokens": 100},
        {"context": 10_000},
        {"prompt_context": 100_000},
        {"adapted_tokens": 1},
        {"adapter_bytes": 1 << 26},
    ):
        assert model.seconds(replace(base, **change)) > model.seconds(base)
    slower = StepModel(llama(), GPUS["l40s"])
    assert slower.seconds(base) > 3 * model.seconds(base)


def test_experts_and_ranks():
    few, many = (StepLoad(rows, 0, 0) for rows in (2, 64))
    experts = StepModel(llama("qwen3-30b-a3b"), H200, NOTHING)
    assert experts.seconds(many) > 4 * experts.seconds(few)  # of 128 experts 98 % are read instead of 12 %
    one, two = (StepModel(llama("llama-8b", ranks), H200) for ranks in (1, 2))
    assert one.seconds(many) / 2 < two.seconds(many) < one.seconds(many)
    assert two.seconds(StepLoad(0, 256, 0)) < two.seconds(StepLoad(0, 257, 0)) - 3e-4  # NCCL's from there on


def test_the_calibrated_coefficients_are_physical():
    """None is negative, and nothing is faster than the hardware allows."""
    assert min(vars(CALIBRATED).values()) >= 0
    assert CALIBRATED.products >= 1 and CALIBRATED.lora_read >= 1
