"""How long the answer to a request will be at least, while it is still being generated.

Knows what the engine has said, not how a route writes it: a character, token or number is counted as the fewest bytes
that it takes in JSON.
"""

from collections.abc import Sequence

from multilora.engine.messages import Logprobs, Output
from multilora.front.stream import Delta

LOGPROB_BYTES = 16
"""What one logprob with its token takes: `[-1.2345,5,null],` is the shortest form, and most have more digits."""


class AnswerSize:
    """The least number of bytes, `total`, of all samples of one request."""

    def __init__(self) -> None:
        self.total = 0
        self._sizes: dict[str, int] = {}  # by the sample's key

    def add(self, output: Output, delta: Delta) -> None:
        """The output has added this to its sample."""
        size = max(len(delta.text), len(delta.token_ids))
        size += _logprob_bytes(delta.logprobs) + _logprob_bytes(delta.input_logprobs)
        self._sizes[output.rid] = self._sizes.get(output.rid, 0) + size
        self.total += size

    def begin_again(self, output: Output) -> None:
        """What has been added to the output's sample is void."""
        self.total -= self._sizes.pop(output.rid, 0)


def _logprob_bytes(logprobs: Sequence[Logprobs | None]) -> int:
    return LOGPROB_BYTES * sum(1 + len(one.top) for one in logprobs if one is not None)
