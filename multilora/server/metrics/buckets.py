"""Bucket boundaries of the peers' histograms: vLLM 0.33.0 (`v1/metrics/buckets.py`) and SGLang 0.5.23
(`srt/observability/metrics_collector.py`), in seconds or tokens. Boards select single boundaries (`le="1.0"`).
"""

# fmt: off
VLLM_LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
VLLM_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)
VLLM_INTER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
VLLM_SAMPLES = (1, 2, 5, 10, 20)
SGLANG_FIRST_TOKEN = (
    0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400,
)
SGLANG_INTER_TOKEN = (
    0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080, 0.100, 0.200, 0.400,
    0.600, 0.800, 1.000, 2.000, 4.000, 6.000, 8.000,
)
SGLANG_LATENCY = (*SGLANG_FIRST_TOKEN, 600, 1200, 1800, 2400)
# fmt: on


def token_buckets(context_length: int) -> tuple[int, ...]:
    """vLLM's buckets of a request's tokens: 1, 2, 5, 10, … up to the context length."""
    bounds = (m * 10**e for e in range(len(str(context_length))) for m in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= context_length)
