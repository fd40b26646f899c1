"""How long a step takes, learnt from those that have run. Admission asks whether waiting a little saves a step."""

FORGET = 0.95  # weight that older steps keep with every new one
LONGEST = 0.25  # seconds; longer steps, such as those that compile kernels, count as this


class StepCost:
    """seconds(n prompt tokens) = fixed + per_token x n, a regression in which older steps count less."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, n, seconds, n x n, n x seconds
        self._decode: float | None = None

    def observe(self, prompt_tokens: int, seconds: float) -> None:
        """A step with so many new prompt tokens beside its decodes has taken `seconds`."""
        n, seconds = prompt_tokens, min(seconds, LONGEST)
        if n == 0:
            before = seconds if self._decode is None else self._decode
            self._decode = FORGET * before + (1 - FORGET) * seconds
        else:
            new = (1, n, seconds, n * n, n * seconds)
            self._sums = [FORGET * old + value for old, value in zip(self._sums, new, strict=True)]

    @property
    def decode(self) -> float:
        """Seconds of a step without prompt tokens; 0 if there was none yet."""
        return self._decode or 0.0

    @property
    def per_token(self) -> float:
        weight, tokens, seconds, squares, products = self._sums
        spread = weight * squares - tokens**2
        if spread <= 1e-6 * weight * squares:
            return 0.0  # all had the same number of tokens
        return max(0.0, (weight * products - tokens * seconds) / spread)

    @property
    def fixed(self) -> float:
        """Seconds of a step with prompt tokens, however few; 0 if there was none yet."""
        weight, tokens, seconds, _, _ = self._sums
        return max(0.0, (seconds - self.per_token * tokens) / weight) if weight else 0.0
