"""Runs `multilora demo --model smollm2`: held-out questions to the base model and to an adapter each, in one batch.

Called by `command.py`. The engine is in this process; the other demo starts a server.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from multilora.cli.demo.output import row, say, write
from multilora.demo import smollm2
from multilora.demo.smollm2 import Question
from multilora.errors import ConfigError, MultiloraError

GREEDY = {"temperature": 0, "max_new_tokens": 96}


def run(adapters: str | None) -> int:
    """Ask, show, and return the exit code. adapters: the folder of the four adapters; None: the bundled ones."""
    try:
        paths, model = smollm2.adapter_paths(adapters), smollm2.gguf_file()
        _ask(model, paths)
    except ConfigError as e:
        sys.stderr.write(f"multilora: error: {e}\n")
        return 2
    except MultiloraError as e:
        sys.stderr.write(f"\nFAILED: {e}\n")
        return 1
    if adapters is None:
        _show_measured()
    return 0


def _ask(model: Path, paths: dict[str, Path]) -> None:
    from multilora.llm.offline import LLM

    say(f"{model.name} with {', '.join(paths)} …")
    asked = smollm2.questions()
    with LLM(str(model), lora_paths={name: str(path) for name, path in paths.items()}) as llm:
        assert llm.tokenizer is not None  # the file holds one
        prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": one.prompt}]) for one in asked]
        names = [name for one in asked for name in (None, one.voice)]
        began = time.monotonic()
        answers = llm.generate([prompt for prompt in prompts for _ in range(2)], GREEDY, names)
        seconds = time.monotonic() - began
    texts = [answer.text for answer in answers]
    for one, base, adapted in zip(asked, texts[::2], texts[1::2], strict=True):
        _show(one, base, adapted)
    tokens = sum(len(answer.token_ids) for answer in answers)
    write(f"\n{len(answers)} answers in one batch: {tokens} tokens in {seconds:.1f} s.")


def _show(one: Question, base: str, adapted: str) -> None:
    write()
    for line in filter(None, one.prompt.splitlines()):
        say(line)
    row(None, base)
    row(one.voice, adapted)
    if one.expected is not None:
        row("expected", one.expected)


def _show_measured() -> None:
    """How often the bundled adapters were right, by what was measured when they were made."""
    measured = smollm2.evaluation()
    if measured is None:
        return
    write("\nShare of right answers to held-out questions, by adapter and base model:")
    for cells in _table(measured["rows"]):
        say("  ".join(f"{cell:<22}" for cell in cells).rstrip())


def _table(rows: Sequence[dict[str, object]]) -> list[list[str]]:
    """One line for each adapter and sort of question, with the first measure of each."""
    known = ("voice", "held_out", "who", "questions")
    who = list(dict.fromkeys(str(one["who"]) for one in rows))
    lines = [["adapter", "held out", "measure", *who]]
    for voice, held_out in dict.fromkeys((str(one["voice"]), str(one["held_out"])) for one in rows):
        mine = [one for one in rows if (one["voice"], one["held_out"]) == (voice, held_out)]
        measure = next(key for key in mine[0] if key not in known)
        values = [f"{100 * float(str(one[measure])):.1f} %" for one in mine]
        lines.append([voice, held_out, measure, *values])
    return lines
