"""From a request for an embedding to the engine's words, and from the row that comes back to the vector.

Pure functions; raise BadRequest. A row is what the model's last norm has made of one token, or a mean of those; what
is left of it, how long it is and how it is written is decided here.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from multilora.errors import BadRequest, MultiloraError
from multilora.front.generation import Job, Sample
from multilora.params import POOLING_METHODS, EmbeddingSettings, PoolingMethod, PoolingParams, SamplingParams

Vector = npt.NDArray[np.float32]

READ_ONLY = SamplingParams(max_new_tokens=0, temperature=0.0)
"""The sampling of a prompt that is read, not answered."""


def check_method(value: Any, param: str) -> PoolingMethod | None:
    """Null is the model's own. Raises BadRequest naming field and value."""
    if value is None:
        return None
    for method in POOLING_METHODS:
        if isinstance(value, str) and value.lower() == method:
            return method
    raise BadRequest(f"{param} = {value!r:.100}: must be one of {', '.join(POOLING_METHODS)}", param=param)


def check_dimensions(dimensions: int | None, size: int) -> int | None:
    """How many numbers are wanted of the first ones; null: all. Raises BadRequest."""
    if dimensions is not None and not 1 <= dimensions <= size:
        raise BadRequest(f"dimensions = {dimensions}: must be 1 to {size}, the model's own", param="dimensions")
    return dimensions


def embedding_job(prompt: Any, settings: EmbeddingSettings, method: PoolingMethod | None, **others: Any) -> Job:
    """The job of one text. method: None: the model's own; others: fields of `Job`."""
    return Job(prompt=prompt, sampling=READ_ONLY, pooling=PoolingParams(method or settings.method), **others)


def row_of(sample: Sample) -> Vector:
    """What the engine has made of the sample's prompt. The sample has ended; raises MultiloraError if it was
    aborted."""
    finished = sample.stream.finished
    if finished is not None and finished.type == "abort":
        raise MultiloraError(f"the request was aborted: {finished.message}")
    return np.frombuffer(sample.stream.pooled, dtype="<f4")


def vector_of(sample: Sample, dimensions: int | None, *, normalize: bool) -> Vector:
    """The embedding, fp32 [dimensions]: the first numbers of the row, then scaled to length 1 if `normalize`, as
    Matryoshka embeddings (Kusupati et al. 2022, arXiv:2205.13147) are cut."""
    vector = row_of(sample)[:dimensions]
    if not normalize:
        return vector
    length = math.sqrt(float(np.square(vector, dtype=np.float64).sum()))
    scaled: Vector = (vector / max(length, 1e-12)).astype(np.float32)
    return scaled
