"""`bench.http_face` with few tokens, and its client, `bench/http_streams.py`."""

import socket

import pytest

from bench.http_face import rows
from bench.http_streams import Streams


def test_tokens_are_counted_however_the_stream_is_cut():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        steps = []
        client = Streams(listener.getsockname()[1], b"hello", b'"text":"', lambda: steps.append(1))
        client.open(1)
        served, _ = listener.accept()
        assert served.recv(100) == b"hello"
        for part in (b'data: {"te', b'xt":"a"}\n\ndata: {"text":', b'"b"}\n\ndata: {"text":"c"}\n\n', b'da"text":'):
            served.sendall(part)
            client._read(5.0)
        assert client.tokens == 3
        served.close()
        with pytest.raises(RuntimeError, match="a stream ended after 3 tokens"):
            client._read(5.0)
        client.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_it_measures(workers):
    found = rows(2, "completions", rounds=1, tokens=200, paced_steps=2, workers=workers)
    assert len(found) == 5 + (workers > 1) and all(row["value"] > 0 for row in found)
