"""Which weights an answer comes from: the adapter version's number and the label that the trainer gave the weights.

The number is the registry's: it rises with each load and is never used again, so two answers with the same number
come from the same weights. The label (`weight_version`) is the caller's own text, of the adapter or the whole server.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from multilora.errors import BadRequest

DEFAULT_WEIGHT_VERSION = "default"  # as SGLang and vLLM name weights that nobody has named
MAX_WEIGHT_VERSION = 256  # characters


@dataclass(frozen=True)
class VersionLabel:
    """lora_version: None: the base model. Of several adapters that act together, both are the newest one's."""

    weight_version: str = DEFAULT_WEIGHT_VERSION
    lora_version: int | None = None


UNLABELLED = VersionLabel()


@dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, end) of an answer, all from the weights of one label."""

    start: int
    end: int
    label: VersionLabel


@dataclass
class VersionHistory:
    """Which weights the tokens of one answer come from: `first`, then others from the index of some token on."""

    first: VersionLabel = UNLABELLED
    _switches: list[tuple[int, VersionLabel]] = field(default_factory=list)  # by ascending index

    def switch(self, start: int, label: VersionLabel) -> None:
        """The tokens from index `start` on come from other weights; `start` never falls."""
        if start == 0:
            self.first = label
        elif self._switches and self._switches[-1][0] == start:
            self._switches[-1] = (start, label)
        else:
            self._switches.append((start, label))

    def spans(self, end: int) -> list[VersionSpan]:
        """The spans of the first `end` tokens: one span at least, which is empty where there are none."""
        starts = [(0, self.first), *(switch for switch in self._switches if switch[0] < end)]
        ends = [start for start, _ in starts[1:]] + [end]
        return [VersionSpan(start, stop, label) for (start, label), stop in zip(starts, ends, strict=True)]

    def last(self, end: int) -> VersionLabel:
        """The version of the last of the first `end` tokens."""
        return self.spans(end)[-1].label if self._switches else self.first


def newest_label(versions: Sequence[tuple[int, str | None]], default: str) -> VersionLabel:
    """The label of adapter versions that act together, each a number and its own label, None: it has none. As numbers
    rise with time, the newest one's changes whenever one of them is replaced."""
    if not versions:
        return VersionLabel(default)
    number, label = max(versions, key=lambda version: version[0])
    return VersionLabel(default if label is None else label, number)


def check_weight_version(label: str | None, param: str = "weight_version") -> None:
    """Raise BadRequest unless `label` is None or a text of bounded length."""
    if label is not None and not 1 <= len(label) <= MAX_WEIGHT_VERSION:
        raise BadRequest(f"{param}: has 1 to {MAX_WEIGHT_VERSION} characters, not {len(label)}", param=param)
