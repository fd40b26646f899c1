"""What is counted of speculative decoding: drafts, their tokens, and those that were right. Names as in vLLM."""

from collections.abc import Iterator
from dataclasses import dataclass

FAMILIES = {
    "spec_decode_num_drafts": "Drafts that were verified",
    "spec_decode_num_draft_tokens": "Tokens of these drafts",
    "spec_decode_num_accepted_tokens": "Tokens of these drafts that were right",
}


@dataclass
class DraftCounts:
    """Counters only grow."""

    drafts: int = 0
    tokens: int = 0
    accepted: int = 0

    def count(self, drafted: int, accepted: int) -> None:
        """A draft of so many tokens was verified."""
        self.drafts += 1
        self.tokens += drafted
        self.accepted += accepted

    def absorb(self, other: "DraftCounts") -> None:
        """Add what `other` has counted."""
        self.drafts += other.drafts
        self.tokens += other.tokens
        self.accepted += other.accepted

    def families(self) -> Iterator[tuple[str, str, int]]:
        """Name, description and value of each."""
        values = (self.drafts, self.tokens, self.accepted)
        for (name, text), value in zip(FAMILIES.items(), values, strict=True):
            yield name, text, value
