"""A step fails on the device: the real application over a real engine process, which ends of a real CUDA error."""

import asyncio
from pathlib import Path

import pytest
import torch
from fakes.models import make_adapter, make_tiny_model
from fakes.server_app import Answer, LocalServer

from multilora.config import Config
from multilora.engine.messages import Output, Submit
from multilora.engine.process.client import EngineClient
from multilora.params import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SECONDS = 180  # an engine on a GPU takes a while to start
LONG = {"max_new_tokens": 200, "ignore_eos": True}


def test_every_request_ends_once_with_an_error_and_health_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    make_tiny_model(tmp_path / "model")
    make_adapter(tmp_path / "adapter", tmp_path / "model", r=4, target_modules=["q_proj", "v_proj"])
    config = Config.make(
        model_path=str(tmp_path / "model"), device="cuda", enable_lora=True, arena_bytes=1 << 26, log_level="warning"
    )
    asyncio.run(asyncio.wait_for(scenario(config, str(tmp_path / "adapter")), SECONDS))
    assert "the engine process ended with code 1" in caplog.text
    log = capfd.readouterr().err  # the engine's
    assert "a step failed; the engine ends" in log
    assert "device-side assert" in log, "why"


async def scenario(config: Config, adapter: str) -> None:
    client = await EngineClient.start(config)
    server = LocalServer(client, None)
    await server.load_from("a", adapter)
    assert (await server.send("GET", "/health")).status == 200

    def ask(name: str | None, stream: bool) -> dict:
        return {"input_ids": [5, 9], "lora_path": name, "stream": stream, "sampling_params": LONG}

    whole = [server.connect("POST", "/generate", ask(name, False)) for name in (None, "a")]
    streams = [server.connect("POST", "/generate", ask(name, True)) for name in (None, "a")]
    for stream in streams:
        assert (await stream.frame())["output_ids"]  # it runs
    # a token that the door would never let in: the embedding reads beyond its table
    sampling = SamplingParams(max_new_tokens=1)
    poison: asyncio.Queue[Output] = asyncio.Queue()
    client.submit(Submit(rid="poison", input_ids=[10**6], sampling=sampling), poison.put_nowait)
    for connection in whole:
        check_error(await connection.answer())
    for stream in streams:
        *tokens, error = (await stream.answer()).frames
        assert "the engine process ended with code 1" in error["error"]["message"]
        assert not any("error" in frame or frame["meta_info"]["finish_reason"] for frame in tokens), "a second ending"
    finished = (await poison.get()).finished
    assert finished is not None and (finished.type, finished.kind) == ("error", "EngineDead")
    assert poison.empty()
    assert (await server.send("GET", "/health")).status == 503
    check_error(await server.send("POST", "/generate", ask(None, False)))
    assert client._process.returncode == 1
    await client.shutdown()


def check_error(answer: Answer) -> None:
    assert answer.status == 503
    assert "the engine process ended" in answer.error["message"]
