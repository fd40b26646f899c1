"""Logits in, one token per row out: edits, grammar masks, then argmax or a random draw, and logprobs.

Owns the order of operations (see `SamplingParams`) and nothing that lasts: what a request carries from step to step
is in its `LogitEdits` and `GrammarState`. Knows nothing of text, stopping or scheduling. A row's token depends on
that row alone, never on its neighbours; stages that no row needs are skipped; nothing waits for the device before
`DeviceSampled.to_host`. Called by `engine/execution/runner.py` after the forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multilora.engine.sampling.draw import draw
from multilora.engine.sampling.grammar import GrammarState, apply_masks
from multilora.engine.sampling.logit_edits import LogitEdits, apply_penalties_and_bias, forbid_ends
from multilora.engine.sampling.logprobs import TokenLogprobs, token_logprobs
from multilora.engine.sampling.uniform import uniforms
from multilora.params import SamplingParams
from multilora.transfer import download, upload

NOT_FINITE = "the model produced logits that are not finite"
NONE_ALLOWED = "no token is allowed by the grammar, logit_bias and min_new_tokens together"


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits: a request that gets a token in this step."""

    params: SamplingParams
    seed: int  # params.sampling_seed, or one drawn at admission
    position: int  # index of the new token within the answer, from 0
    output_ids: Sequence[int] = ()  # the answer so far
    edits: LogitEdits | None = None  # LogitEdits.make(...) of the request
    grammar: GrammarState | None = None
    top_logprobs: int = -1  # -1: no logprobs; 0: the chosen token's; k: also the k best


@dataclass(frozen=True, slots=True)
class Sampled:
    """On the host, one entry per row. A row with an error has a meaningless token."""

    token_ids: list[int]
    logprobs: list[float | None]  # None where not asked for
    top_logprobs: list[list[tuple[float, int]] | None]  # best first; None where not asked for
    errors: list[str | None]


@dataclass(frozen=True, slots=True)
class DeviceSampled:
    """On the device, possibly still being computed. `token_ids` can feed the next forward pass as they are."""

    token_ids: Tensor  # int64 [rows]
    finite: Tensor  # bool [rows], the row's logits were
    allowed: Tensor | None  # bool [rows], some token was; None: nothing was forbidden in any row
    logprobs: TokenLogprobs | None  # of the rows that asked, in order
    top_logprobs: tuple[int, ...]  # SampleRow.top_logprobs of all rows

    def to_cpu(self) -> "DeviceSampled":
        """Start to copy to the host: what comes back is complete once a `Fence` made afterwards has passed."""
        return DeviceSampled(
            download(self.token_ids),
            download(self.finite),
            None if self.allowed is None else download(self.allowed),
            None if self.logprobs is None else self.logprobs.to_cpu(),
            self.top_logprobs,
        )

    def to_host(self) -> Sampled:
        """Wait for the device and fetch everything."""
        finite = self.finite.tolist()
        allowed = [True] * len(finite) if self.allowed is None else self.allowed.tolist()
        errors = [
            None if f and a else NONE_ALLOWED if f else NOT_FINITE for f, a in zip(finite, allowed, strict=True)
        ]
        logprobs: list[float | None] = [None] * len(finite)
        tops: list[list[tuple[float, int]] | None] = [None] * len(finite)
        if self.logprobs is not None:
            asked = [i for i, k in enumerate(self.top_logprobs) if k >= 0]
            for i, logprob, top in zip(asked, *self.logprobs.to_host(), strict=True):
                logprobs[i], tops[i] = logprob, top[: self.top_logprobs[i]]
        return Sampled(self.token_ids.tolist(), logprobs, tops, errors)


class Sampler:
    """Chooses tokens. Stateless but for sizes: one per engine, on the device of the logits.

    vocab_size: the base model's; rows of logits are longer in a step that has an adapter with more tokens.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size = vocab_size
        self.device = device

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> DeviceSampled:
        """One token for each row of `logits`, fp32 [rows, vocab], which is left as it is."""
        assert len(logits) == len(rows) and logits.shape[1] >= self.vocab_size, (logits.shape, len(rows))
        assert logits.dtype == torch.float32, logits.dtype
        edited = self._edit(logits, rows)
        tokens = _choose(edited, rows)
        return DeviceSampled(
            token_ids=tokens,
            finite=logits.amax(-1).isfinite(),  # NaN anywhere makes the maximum NaN
            allowed=None if edited is logits else edited.amax(-1).isfinite(),
            logprobs=_logprobs(logits, tokens, rows),
            top_logprobs=tuple(row.top_logprobs for row in rows),
        )

    def _edit(self, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """`logits` itself if no row asks for edits, else an edited copy."""
        edits = [(i, row.edits, row) for i, row in enumerate(rows) if row.edits is not None]
        constrained = [(i, row.grammar) for i, row in enumerate(rows) if row.grammar is not None]
        if not edits and not constrained:
            return logits
        logits = logits.clone()
        apply_penalties_and_bias(logits, [(i, edit, row.output_ids) for i, edit, row in edits])
        ends = {i: edit for i, edit, row in edits if edit.must_go_on(row.position)}
        if constrained:
            masks = torch.empty(len(constrained), (logits.shape[1] + 31) // 32, dtype=torch.int32)
            for mask, (i, grammar) in zip(masks, constrained, strict=True):
                edit = ends.pop(i, None)
                grammar.fill_mask(mask, edit.end_ids if edit else ())
            apply_masks(logits, [i for i, _ in constrained], masks, self.vocab_size)
        if ends:
            forbid_ends(logits, list(ends.items()))
        return logits


def _choose(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """int64 [rows]"""
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if not drawn:
        return _argmax(logits)
    everyone = len(drawn) == len(rows)
    index = upload(drawn, logits.device)
    numbers = uniforms([rows[i].seed for i in drawn], [rows[i].position for i in drawn])
    tokens = draw(logits if everyone else logits[index], [rows[i].params for i in drawn], numbers)
    return tokens if everyone else _argmax(logits).index_copy_(0, index, tokens)


def _argmax(logits: Tensor) -> Tensor:
    """The best token, the lowest id among equals. On CPU numpy's is ten times faster than torch's."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _logprobs(logits: Tensor, tokens: Tensor, rows: Sequence[SampleRow]) -> TokenLogprobs | None:
    asked = [i for i, row in enumerate(rows) if row.top_logprobs >= 0]
    if not asked:
        return None
    if len(asked) < len(rows):
        index = upload(asked, logits.device)
        logits, tokens = logits[index], tokens[index]
    return token_logprobs(logits, tokens, max(row.top_logprobs for row in rows))
