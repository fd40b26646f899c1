"""How long an answer must be: never more than what a route writes, and nothing of a sample that begins again."""

import msgspec

from multilora.engine.messages import Logprobs, Output
from multilora.front.answer_size import AnswerSize
from multilora.front.stream import Delta


def output(rid="a"):
    return Output(rid=rid, token_ids=[5])


def test_text_and_tokens():
    size = AnswerSize()
    size.add(output(), Delta("héllo", [5, 6]))
    assert size.total == 5
    size.add(output("b"), Delta("", [5, 6, 7]))
    assert size.total == 8


def test_a_sample_that_begins_again():
    size = AnswerSize()
    for rid in ("a", "a", "b"):
        size.add(output(rid), Delta("abc", [5]))
    size.begin_again(output("a"))
    assert size.total == 3
    size.begin_again(output("c"))
    assert size.total == 3


def test_logprobs_are_no_shorter_as_json():
    """As `/generate` writes them, which is the shortest form."""
    one = Logprobs(-1.2345, [(-1.5678, 5), (-2.3456, 600)])
    size = AnswerSize()
    size.add(output(), Delta("", [5, 6], [one, one], [None, one]))
    triples = [(one.logprob, 5, None), *((logprob, token, None) for logprob, token in one.top)]
    assert size.total == 2 + 9 * 16 <= 2 + 3 * len(msgspec.json.encode(triples))
