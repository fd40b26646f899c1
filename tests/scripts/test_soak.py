"""A soak of a real server: a short one with a killed loader, and a minute with killed engines."""

import argparse
import asyncio
import time

import httpx
import pytest

from scripts.soak.__main__ import run
from scripts.soak.clients import Clients, WrongEndingError

WHOLE = {"seconds": 60.0, "adapters": 40, "clients": 16, "kills": 4, "seed": 0, "front_workers": 1, "pause": 0.0}


@pytest.mark.slow
def test_a_short_soak(capsys):
    assert run(argparse.Namespace(**WHOLE | {"seconds": 8.0, "adapters": 8, "clients": 6, "kills": 1})) == 0
    text = capsys.readouterr().out
    assert "BAD" not in text and text.count("ok ") >= 8 and "killed: loader" in text


@pytest.mark.slow
def test_a_short_soak_with_several_front_processes(capsys):
    short = {"seconds": 20.0, "adapters": 8, "clients": 6, "kills": 3, "front_workers": 2}
    assert run(argparse.Namespace(**WHOLE | short)) == 0
    assert "front" in capsys.readouterr().out.partition("killed:")[2].partition("\n")[0]


@pytest.mark.slow
def test_a_soak_of_a_minute(capsys):
    assert run(argparse.Namespace(**WHOLE)) == 0
    assert "killed: loader engine" in capsys.readouterr().out


def test_it_can_fail():
    clients = Clients(None, 4, 0)
    clients.expected["sql", "p"] = "SELECT 1"
    assert clients._judge("SELECT 1", "p", {"sql", "gone"}) == "right"
    with pytest.raises(WrongEndingError):
        clients._judge("SELECT 2", "p", {"sql"})
    assert clients._error({"code": "EngineRestarting"}) == "EngineRestarting"
    with pytest.raises(WrongEndingError):
        clients._error({"code": "MultiloraError"})
    broken = httpx.ReadError("")
    assert clients._cut(broken, time.monotonic()) == ""
    clients.front_ended_at = time.monotonic()
    assert clients._cut(broken, time.monotonic()) and not clients._cut(httpx.DecodingError(""), time.monotonic())
    assert not clients._cut(broken, time.monotonic() + 60)


def test_a_change_may_go_on_behind_a_cut_connection_and_at_no_other_time():
    def being_unloaded(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400, json={"success": False, "error_message": "adapter 'a2' is being unloaded"})

    async def change() -> str:
        async with httpx.AsyncClient(transport=httpx.MockTransport(being_unloaded), base_url="http://soak") as http:
            return await Clients(http, 4, 0)._change("/load_lora_adapter", {})

    with pytest.raises(WrongEndingError, match="being unloaded"):
        asyncio.run(change())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clients, "front_ended_at", time.monotonic())
        assert asyncio.run(change()) == "under way"
