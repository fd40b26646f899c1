"""Bodies as JSON: what is no number is said with its field, and no body takes long to be refused."""

import time

import pytest

from multilora.errors import BadRequest
from multilora.server.strict_json import decode

REFUSED = {
    b'{"n": NaN}': ("n = NaN: a number has to be finite", "n"),
    b'{"a": {"x": 1}, "b": -Infinity}': ("b = -Infinity: a number", "b"),
    b'{"logit_bias": {"5": 1e400}}': ("logit_bias.5 = 1e400: a number", "logit_bias"),
    b'{"sampling_params": {"top_p": -1E+999}}': ("sampling_params.top_p = -1E+999: ", "top_p"),
    b'{"sampling_params": [{"n": 2}, {"logit_bias": {"5": NaN}}]}': (
        "sampling_params.logit_bias.5 = NaN",
        "logit_bias",
    ),
    b'{"ids": [[1], [2, Infinity]]}': ("ids = Infinity: a number", "ids"),
    b'{"a\\"}": "NaN", "b": [{"c": [NaN]}]}': ("b.c = NaN", "b"),
    b"[NaN]": ("not valid JSON: NaN: a number", None),
    b'{"n": %s}' % (b"9" * 5000): ("an integer has at most 4300 digits", "n"),
    b'{"n": %s.5}' % (b"9" * 400): ("a number has to be finite", "n"),
    b'{"text": "NaN", "n": }': ("JSON is malformed", None),
    b'{"text": "\\ud800"}': ("not valid JSON", None),
    b'{"n": ' + b"[" * 100_000: ("nested too deeply", None),
}


@pytest.mark.parametrize(("body", "expected"), REFUSED.items(), ids=[body[:30].decode() for body in REFUSED])
def test_what_is_wrong_is_said_with_its_field(body: bytes, expected: tuple[str, str | None]) -> None:
    words, param = expected
    with pytest.raises(BadRequest) as caught:
        decode(body)
    assert words in caught.value.message
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("body", [b'{"n": %s}' % (b"9" * 4300), b'{"n": 0e999}', b'{"n": 1e-999}', b'{"n": -0.0}'])
def test_numbers_that_can_be_read_are(body: bytes) -> None:
    assert set(decode(body)) == {"n"}


@pytest.mark.parametrize(
    "piece", [b'\\"', b'""', b"1", b'"a":', b"[{", b"\\", b"-", b"1.", b"1e", b'"a"    ', b"NaN"]
)
def test_no_body_takes_long(piece: bytes) -> None:
    start = time.process_time()
    for body in (piece * 500_000, b'"' + piece * 500_000):
        with pytest.raises(BadRequest):
            decode(body)
    assert time.process_time() - start < 5
