"""A warmup of sampling on a GPU: every stage runs once before anybody waits for it, as its kernels are compiled at
their first use, which takes long enough for all streams to stall. Called by `engine/build_rank.py`."""

import numpy as np
import torch

from multilora.engine.sampling import triton_sampling
from multilora.engine.sampling.batch import Column
from multilora.engine.sampling.edits import EditTables
from multilora.engine.sampling.sampler import Sampler
from multilora.engine.sampling.state import SamplingState
from multilora.params import SamplingParams

MOST_LIKELY = 3  # alternatives to a token
ALIGNED = 16
"""Numbers of which Triton tells multiples from others."""


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Compile all kernels of sampling for `device`, a GPU; other numbers of rows, biases or alternatives need none of
    their own, nor do adapters with more tokens, whose rows begin at multiples of 64 bytes or do not."""
    sampler = Sampler(vocab_size, device)
    drawn = SamplingParams(top_p=0.9, top_k=5, min_p=0.1, presence_penalty=0.1, logit_bias={"1": 1.0})
    for slot, params in enumerate((drawn, SamplingParams(temperature=0.0))):
        sampler.install(
            SamplingState(
                slot=slot, params=params, seed=0, vocab_size=vocab_size, top_logprobs=MOST_LIKELY, ranks=True,
                processed=True,
            )
        )  # fmt: skip
    with torch.inference_mode():
        for columns in (vocab_size, vocab_size + (-vocab_size % ALIGNED or 1)):
            logits = torch.zeros(2, columns, device=device)
            sampler.sample(logits, [0, 1], [0, 0])
            masks = torch.full((2, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)
            numbers = torch.zeros(len(Column), 2, dtype=torch.float64, device=device)
            numbers[Column.MASK] = torch.from_numpy(np.arange(2.0)).to(device)
            triton_sampling.edited(logits, numbers, EditTables(device), masks, vocab_size, biases=False)
