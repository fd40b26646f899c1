"""The servers that `bench.http_face` compares, each a process: `python -m bench.http_servers NAME STREAMS WORKERS`.

- face: this package's application under uvicorn as `multilora serve` runs it, with an engine that computes nothing;
  with more than one WORKERS, that many front processes and this one as their supervisor
- bare: a Starlette application of one route, whose streams send a ready-made frame of the same size for each token

Both wait for STREAMS requests. Then each byte on stdin is a step: the engine's message for all streams, encoded as it
comes from an engine process, is decoded and delivered. Stdout has the port, and at the end the CPU seconds of this
process and those of what it has started.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from multilora.config import Config
from multilora.engine.messages import Output, Outputs, Ready, Stats, Submit, decode_from_engine, encode
from multilora.front.tokenizer import Tokenizer
from multilora.params import EmbeddingSettings
from multilora.server.app import create_app
from multilora.server.uvicorn_setup import event_loop, freeze_objects, uvicorn_config
from multilora.server.workers.pool import FrontWorkers

FRAME = (
    b'data: {"id":"cmpl-%s","object":"text_completion","created":1764400000,"model":"base","choices":[{"index":0,'
    % (b"0" * 32)
    + b'"text":" the","logprobs":null,"finish_reason":null}]}\n\n'
)


class Steps:
    """Where the tokens come from: `deliver` is called for each stream at each step."""

    def __init__(self, streams: int, token: int):
        self._streams = streams
        self._token = token
        self._receivers: dict[str, Callable[[Output], None]] = {}
        self._message: bytes = b""

    def submit(self, message: Submit, deliver: Callable[[Output], None]) -> None:
        self.add(message.rid, deliver)

    def add(self, rid: str, deliver: Callable[[Output], None]) -> None:
        """One more stream. With the last one the steps begin."""
        self._receivers[rid] = deliver
        if len(self._receivers) == self._streams:
            self._message = encode(Outputs([Output(rid=rid, token_ids=[self._token]) for rid in self._receivers]))
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._read)

    def _read(self) -> None:
        match os.read(sys.stdin.fileno(), 1):  # one at a time: what a step has woken runs before the next
            case b"t":
                self._step()
            case b"c":
                sys.stdout.write(f"{time.process_time()} {children_seconds()}\n")
                sys.stdout.flush()
            case _:  # whoever measured is gone
                os._exit(0)

    def _step(self) -> None:
        outputs = decode_from_engine(self._message)
        assert isinstance(outputs, Outputs)
        for output in outputs.items:
            self._receivers[output.rid](output)


def children_seconds() -> float:
    """CPU time of the processes that this one has started, so far."""
    total = 0.0
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split():
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime
    return total


class SteppedEngine(Steps):
    """Stands where an `EngineClient` stands."""

    alive, restarting, restarts = True, False, 0

    def __init__(self, streams: int, token: int):
        super().__init__(streams, token)
        nothing = {name: 0 for name in Stats.__struct_fields__ if Stats.__annotations__[name] is int}
        self.stats = Stats(adapters=[], **nothing)
        self.ready = Ready(
            context_length=1 << 20,
            vocab_size=1 << 17,
            eos_token_ids=[],
            num_layers=1,
            dtype="float32",
            device="cpu",
            lora_backend="none",
            attention_backend="none",
            embedding=EmbeddingSettings(size=64),
            stats=self.stats,
        )

    def abort(self, rid: str, message: str = "") -> None: ...

    def finish(self, rid: str) -> None: ...

    def use_tokenizer(self, info: str) -> None: ...


def application(config: Config, streams: int) -> FastAPI:
    tokenizer = Tokenizer.of(config)
    assert tokenizer is not None
    [token] = tokenizer.encode(" the", add_special_tokens=False)[-1:]
    engine: Any = SteppedEngine(streams, token)
    return create_app(config, engine, tokenizer)


def face(streams: int) -> uvicorn.Config:
    config = Config.make(served_model_name="base", max_running_requests=2 * streams)
    return uvicorn_config(application(config, streams), max_connections=2 * streams)


async def serve_by_workers(streams: int, workers: int) -> None:
    config = Config.make(served_model_name="base", max_running_requests=2 * streams, front_workers=workers)
    app = application(config, streams)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        most = 2 * streams * workers  # the kernel does not share connections out evenly
        pool = FrontWorkers(config, app, listener, app.state.driver, app.state.metrics, most)
        freeze_objects()
        await pool.serve(lambda: say_port(port))


def bare(streams: int) -> uvicorn.Config:
    steps = Steps(streams, 1)

    async def stream(request: Request) -> StreamingResponse:
        await request.body()
        queue: asyncio.Queue[Output] = asyncio.Queue()
        steps.add(str(id(queue)), queue.put_nowait)

        async def frames() -> AsyncIterator[bytes]:
            while True:
                await queue.get()
                yield FRAME

        return StreamingResponse(frames(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/{path:path}", stream, methods=["POST"])])
    return uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")


SERVERS = {"face": face, "bare": bare}


def say_port(port: int) -> None:
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


async def _serve(config: uvicorn.Config) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4096)
        freeze_objects()
        say_port(listener.getsockname()[1])
        await uvicorn.Server(config).serve(sockets=[listener])


async def main(name: str, streams: int, workers: int) -> None:
    if workers > 1:
        await serve_by_workers(streams, workers)
    else:
        await _serve(SERVERS[name](streams))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=event_loop()) as runner:
        runner.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
