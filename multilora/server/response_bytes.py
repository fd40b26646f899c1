"""How much one request may be sent (--max-response-bytes), counted as it is sent.

Frames of a stream that has all of an answer in each, and logprobs of many alternatives, are far longer than the text.
Knows nothing of what the bytes say.
"""

from typing import TypeVar

from starlette.responses import Response

from multilora.errors import ResponseTooLarge

R = TypeVar("R", bound=Response)


class ResponseBudget:
    """The bytes that one request may still be sent. Its methods raise ResponseTooLarge."""

    def __init__(self, limit: int):
        self.limit = limit
        self._left = limit

    def spend(self, data: bytes) -> bytes:
        """`data`, which is about to be sent; it is not where this raises."""
        if len(data) > self._left:
            self._left = 0  # nothing smaller gets past what was refused
            raise ResponseTooLarge.over(self.limit)
        self._left -= len(data)
        return data

    def whole(self, response: R) -> R:
        """An answer in one piece."""
        self.spend(bytes(response.body))
        return response
