"""Two ranks on two GPUs: NCCL, sums in each other's memory, graphs, FlashInfer, copies beside the steps.

As in `tests/engine/test_gpu.py`, logprobs in bf16 are judged against transformers + PEFT, and two engines in fp32 are
held against each other token for token.
"""

from typing import Any

import pytest
import torch
from exactness import SLACK
from gpu_family import ADAPTERS, EXACT, Family, equal, judged, make_family, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp(request.param), request.param, ADAPTERS)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"disable_custom_all_reduce": True},
    {"disable_cuda_graph": True},
    {"model_impl": "transformers"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_less_exact_than_transformers_and_peft_in_bf16(family: Family, options: dict[str, Any]) -> None:
    driver = family.driver(tp_size=2, chunked_prefill_size=300, **options)
    for cached in (False, True):
        answers = run(driver, family, family.jobs())
        assert (sum(a.cached_tokens for a in answers.values()) > 0) >= cached
        found = judged(family, answers.items())
        assert 0 < found.error <= SLACK * found.theirs
    driver.close()


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_as_one_rank_token_for_token(family: Family, impl: str) -> None:
    """In fp32, with room for two adapters, so that they come and go on both ranks; one rank is always native."""
    alone = family.driver(**EXACT)
    expected = run(alone, family, family.jobs())
    alone.close()
    driver = family.driver(tp_size=2, max_loras_per_batch=2, chunked_prefill_size=64, model_impl=impl, **EXACT)
    for job, answer in run(driver, family, family.jobs()).items():
        assert equal(answer, expected[job]), job
    assert driver.evictions >= len(ADAPTERS) - 2, "admission groups requests by adapter, so each may come once only"
    driver.close()
