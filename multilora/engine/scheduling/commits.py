"""What a step that has run means for its requests: their tokens, how they end, the KV that is theirs now, and what
the front hears of it.

Owns the counts of tokens. Changes how far requests have come and gives full pages to the prefix cache; ends requests
through the scheduler, which calls.
"""

from collections.abc import Callable
from dataclasses import dataclass

from multilora.engine.messages import Finished, Output
from multilora.engine.plan import Chunk, StepResult
from multilora.engine.scheduling.chunks import LaunchedStep, failure, make_output, take_prompt_logprobs
from multilora.engine.scheduling.request import Request, RequestState
from multilora.engine.scheduling.speculation import Speculation
from multilora.memory.page_table import KVPages


@dataclass
class TokenCounts:
    """Tokens since the start: of prompts, computed and found in the prefix cache, and of answers."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


class Commits:
    """finish: ends a request. speculation: hears how drafts were; None: there are none."""

    def __init__(
        self,
        kv: KVPages,
        eos_token_ids: tuple[int, ...],
        *,
        finish: Callable[[Request], None],
        clock: Callable[[], float],
        speculation: Speculation | None,
    ):
        self.counts = TokenCounts()
        self._kv = kv
        self._eos_token_ids = eos_token_ids
        self._finish = finish
        self._clock = clock
        self._speculation = speculation

    def take(self, step: LaunchedStep, result: StepResult, fence: int) -> list[Output]:
        """fence: the last step launched so far."""
        sampled, outputs = 0, list[Output]()
        for i, (chunk, (request, epoch)) in enumerate(zip(step.plan.chunks, step.runs, strict=True)):
            index, sampled = sampled, sampled + len(chunk.answer_positions)
            if request.state is RequestState.FINISHED:
                continue  # it ended while this step was running: the row was wasted
            if sampled > index + 1:
                outputs += self._take_draft(request, chunk, epoch, result, index, fence)
                continue
            self._take_kv(request, chunk, chunk.count, epoch, fence)
            if request.epoch == epoch or request.progress.in_flight:  # or preempted with a token on its way
                take_prompt_logprobs(request, chunk.prompt_logprobs, result.prompt_logprobs[i])
            if chunk.answer_positions:
                outputs.append(self._take_token(request, result, index))
            elif not request.spec.samples and request.progress.num_computed == request.progress.num_tokens:
                self._finish(request)  # max_new_tokens 0: only the prompt was wanted
                end, pooled = Finished(type="length"), result.pooled.get(i, b"")
                outputs.append(make_output(request, self._clock(), [], end, pooled=pooled))
        return outputs

    def _take_kv(self, request: Request, chunk: Chunk, count: int, epoch: int, fence: int) -> None:
        """The KV of the chunk's first `count` tokens is in its pages."""
        progress, table = request.progress, request.table
        self.counts.prompt += max(0, min(count, progress.num_prompt - chunk.start))
        if request.state is not RequestState.RUNNING or request.epoch != epoch:
            return  # preempted since: the pages are no longer its own
        progress.commit(count)
        if not request.mixed and progress.num_computed >= (table.keyed + 1) * self._kv.page_size:
            # where others were faster with the same content, their pages take the places of ours from here on
            request.sent_pages = min(request.sent_pages, table.keyed * self._kv.columns)
            of, salt = request.namespaces.of, request.spec.salt
            self._kv.commit(table, progress.num_computed, request.tokens, of, fence, salt)
        self._kv.leave_windows(table, progress.num_computed, fence)

    def _take_token(self, request: Request, result: StepResult, index: int) -> Output:
        token, error = result.token_ids[index], result.errors[index]
        if error is not None:
            self._finish(request)
            return make_output(request, self._clock(), [], failure(request, error))
        finished = request.ending(token, len(request.progress.output_ids), self._eos_token_ids)
        request.progress.take_token(token)
        self.counts.generated += 1
        if finished is not None:
            self._finish(request)
        return make_output(request, self._clock(), [token], finished, result.logprobs[index : index + 1])

    def _take_draft(
        self, request: Request, chunk: Chunk, epoch: int, result: StepResult, index: int, fence: int
    ) -> list[Output]:
        """The sampled tokens count as far as each was sampled after tokens that are right."""
        if request.epoch != epoch:
            return []  # preempted since: the draft went with its pages
        draft, progress = chunk.token_ids[1:], request.progress
        tokens, finished = self._right_tokens(request, draft, result, index)
        right = len(tokens) - (tokens != draft[: len(tokens)])
        if self._speculation is not None:
            self._speculation.observe(request, len(draft), right)
        outputs = []
        if tokens:
            progress.end_draft(len(tokens) - 1)
            for token in tokens[:-1]:
                progress.take_token(token)
            self._take_kv(request, chunk, len(tokens), epoch, fence)  # whose tokens are known by now
            progress.take_token(tokens[-1])
            self.counts.generated += len(tokens)
        failed = finished is not None and finished.type == "error"
        if finished is not None:
            self._finish(request)
        now, logprobs = self._clock(), result.logprobs[index : index + len(tokens)]
        if tokens:
            ending, numbers = None if failed else finished, (len(draft), right)
            outputs.append(make_output(request, now, tokens, ending, logprobs, b"", *numbers))
        if failed:
            outputs.append(make_output(request, now, [], finished))
        return outputs

    def _right_tokens(
        self, request: Request, draft: list[int], result: StepResult, index: int
    ) -> tuple[list[int], Finished | None]:
        """Up to the first that was not drafted, ends the answer or failed; and that ending."""
        tokens: list[int] = []
        known = len(request.progress.output_ids)
        for i, expected in enumerate((*draft, None), index):
            token, error = result.token_ids[i], result.errors[i]
            if error is not None:
                return tokens, failure(request, error)
            finished = request.ending(token, known + len(tokens), self._eos_token_ids)
            tokens.append(token)
            if finished is not None or token != expected:
                return tokens, finished
        return tokens, None
