"""Replicas of one cluster in one process, with engines that are not there: names, versions, requests, touch lost.

Covers `replica_server.py`, `replica_front.py`, `replica_registry.py`, `local_copies.py`, `shared_records.py`,
`asgi_exchange.py`.
"""

import asyncio
import base64
import json
from pathlib import Path

import pytest
import torch
from fakes.models import FakeEngineClient
from safetensors.torch import save

from multilora.adapters.sources.spool import Spool
from multilora.cluster import asgi_exchange, replica_server
from multilora.cluster.replica_server import ReplicaServer
from multilora.cluster.shared_registry import SharedRegistry
from multilora.config import Config
from multilora.engine.messages import Reply
from multilora.errors import AdapterNotFound
from multilora.front.records import Records
from multilora.lora_path import LoraPath
from multilora.server.key_hash import new_salt, write_hash


class Cluster:
    """Replicas `a` and `b`, and whose engine has loaded what."""

    def __init__(self, tmp_path, startup=(), **options):
        self._options = options
        self.registry = SharedRegistry(Records(), startup, self._alive)
        self.replicas, self.engines, self._root = {}, {}, tmp_path

    async def _alive(self, _name):
        return False

    async def start(self, *names):
        for name in names:
            engine = self.engines[name] = FakeEngineClient()
            engine.shutdown, engine.loaded = _nothing, _Kept()
            fixed = {"served_model_name": "base", "enable_lora": True, "skip_tokenizer_init": True}
            config = Config.make(**fixed, **self._options)
            spool = Spool(self._root / name)
            (self._root / name).mkdir()
            replica = await ReplicaServer.join(name, config, self.registry, engine, None, {}, spool)
            self.replicas[name] = replica

    async def call(self, name, method, path, body=None):
        scope = {
            "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("c", 1), "server": ("s", 1),
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        status, content = 0, b""
        async for some in self.replicas[name].handle(scope, json.dumps(body).encode() if body is not None else b""):
            for message in some:
                status = message.get("status", status)
                content += message.get("body", b"")
        return status, json.loads(content) if content[:1] in (b"{", b"[") else content.decode()

    async def load(self, replica, name, path, **fields):
        body = {"lora_name": name, "lora_path": path} | fields
        return await self.call(replica, "POST", "/load_lora_adapter", body)

    async def generate(self, replica, name):
        """The path of the adapter that has answered; None: there was an error."""
        body = {"input_ids": [1, 2, 3], "lora_path": name, "sampling_params": {"max_new_tokens": 2}}
        status, _ = await self.call(replica, "POST", "/generate", body)
        engine = self.engines[replica]
        return engine.loaded.get(engine.submitted[-1].adapters[0][0]) if status == 200 else None

    async def close(self):
        for replica in self.replicas.values():
            await replica.close()


class _Kept(dict):
    """What was ever loaded."""

    def __delitem__(self, key):
        pass

    def pop(self, key, *default):
        return self.get(key, *default)


async def _nothing(_seconds=0):
    pass


def run(tmp_path, test, names="ab", **options):
    async def whole():
        cluster = Cluster(tmp_path, **options)
        await cluster.start(*names)
        try:
            await test(cluster)
        finally:
            await cluster.close()

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_what_one_has_loaded_the_other_brings_when_it_is_asked(tmp_path):
    async def test(cluster):
        status, answer = await cluster.load("a", "sql", "/sql")
        assert status == 200 and answer["loaded_adapters"] == {"sql": "/sql"}
        _, models = await cluster.call("b", "GET", "/v1/models")
        assert [model["id"] for model in models["data"]] == ["base", "sql"]
        assert not cluster.engines["b"].loaded
        assert await cluster.generate("b", "sql") == "/sql"
        assert await cluster.generate("b", "sql") == "/sql"
        assert list(cluster.engines["b"].loaded.values()) == ["/sql"]

    run(tmp_path, test)


def test_after_a_swap_nobody_serves_the_old_version(tmp_path):
    async def test(cluster):
        await cluster.load("a", "sql", "/old")
        for replica in "ab":
            assert await cluster.generate(replica, "sql") == "/old"
        for i in range(5):
            status, _ = await cluster.load("ab"[i % 2], "sql", f"/new-{i}", upsert=True)
            assert status == 200
            for replica in "ab":
                assert await cluster.generate(replica, "sql") == f"/new-{i}"

    run(tmp_path, test)


def test_swaps_under_load(tmp_path):
    """Requests that were sent after a swap has returned never meet what was before."""

    async def test(cluster):
        await cluster.load("a", "sql", "/0")
        returned, wrong = 0, []

        async def ask(replica):
            while returned < 12:
                least = returned
                path = await cluster.generate(replica, "sql")
                if path is None or int(path[1:]) < least:
                    wrong.append((path, least))

        async def swap():
            nonlocal returned
            for i in range(1, 13):
                status, answer = await cluster.load("ab"[i % 2], "sql", f"/{i}", upsert=True)
                assert status == 200, answer
                returned = i

        await asyncio.gather(swap(), ask("a"), ask("b"))
        assert wrong == []

    run(tmp_path, test)


def test_a_name_is_taken_whoever_has_loaded_it(tmp_path):
    async def test(cluster):
        await cluster.load("a", "sql", "/sql")
        status, answer = await cluster.load("b", "sql", "/other")
        assert status == 400 and "already loaded" in answer["error_message"]
        results = await asyncio.gather(cluster.load("a", "law", "/a"), cluster.load("b", "law", "/b"))
        assert sorted(status for status, _ in results) == [200, 400]
        assert await cluster.generate("a", "law") == await cluster.generate("b", "law")

    run(tmp_path, test)


def test_an_adapter_that_comes_as_tensors_is_kept_where_all_can_read_it(tmp_path):
    """Also once the replica that has taken it in is gone."""

    async def test(cluster):
        weights = base64.b64encode(save({"w": torch.zeros(2)})).decode()
        body = {"lora_name": "rl", "config_dict": {"r": 4}, "serialized_tensors": weights}
        status, answer = await cluster.call("a", "POST", "/load_lora_adapter_from_tensors", body)
        assert status == 200, answer
        kept = await cluster.generate("b", "rl")
        assert Path(kept).parent == tmp_path / "a" and (Path(kept) / "adapter_model.safetensors").exists()
        assert cluster.registry.used_folders() == [kept]
        status, _ = await cluster.call("b", "POST", "/load_lora_adapter_from_tensors", body | {"upsert": True})
        assert status == 200
        second = await cluster.generate("a", "rl")
        assert Path(second).parent == tmp_path / "b"
        while Path(kept).exists():  # until the last request on it has ended
            await asyncio.sleep(0.01)
        await cluster.replicas.pop("b").close()
        await cluster.start("late")
        assert await cluster.generate("late", "rl") == second and Path(second).exists()

    run(tmp_path, test)


def test_unloading_reaches_everybody(tmp_path):
    async def test(cluster):
        await cluster.load("a", "sql", "/sql")
        await cluster.generate("b", "sql")
        status, _ = await cluster.call("a", "POST", "/unload_lora_adapter", {"lora_name": "sql"})
        assert status == 200
        for replica in "ab":
            assert await cluster.generate(replica, "sql") is None
        await cluster.load("b", "sql", "/again")
        assert await cluster.generate("a", "sql") == "/again"
        await cluster.call("a", "POST", "/unload_lora_adapter", {"lora_name": "sql"})
        await cluster.load("b", "far", "/far")
        status, _ = await cluster.call(
            "a", "POST", "/unload_lora_adapter", {"lora_name": "far"}
        )  # never loaded there
        assert status == 200 and await cluster.generate("b", "far") is None

    run(tmp_path, test)


def test_compositions_are_everywhere_and_protect_their_parts(tmp_path):
    async def test(cluster):
        await cluster.load("a", "x", "/x")
        await cluster.load("b", "y", "/y")
        parts = [{"name": "x", "weight": 0.5}, {"name": "y", "weight": 0.5}]
        assert (await cluster.load("a", "mix", parts))[0] == 200
        for replica in "ab":
            assert await cluster.generate(replica, "mix") is not None
            assert len(cluster.engines[replica].submitted[-1].adapters) == 2
        for replica in "ab":
            status, _ = await cluster.call(replica, "POST", "/unload_lora_adapter", {"lora_name": "y"})
            assert status == 400
        await cluster.call("b", "POST", "/unload_lora_adapter", {"lora_name": "mix"})
        assert await cluster.generate("a", "mix") is None
        assert (await cluster.call("a", "POST", "/unload_lora_adapter", {"lora_name": "y"}))[0] == 200

    run(tmp_path, test)


def test_a_load_that_fails_changes_nothing_anywhere(tmp_path):
    async def test(cluster):
        await cluster.load("a", "sql", "/sql")
        cluster.engines["b"].load_errors["/bad"] = AdapterNotFound("not there")
        status, _ = await cluster.load("b", "sql", "/bad", upsert=True)
        assert status == 400
        assert await cluster.generate("a", "sql") == await cluster.generate("b", "sql") == "/sql"

    run(tmp_path, test)


def test_what_cannot_be_brought_is_an_error_that_is_tried_again(tmp_path):
    async def test(cluster):
        await cluster.load("a", "sql", "/sql")
        cluster.engines["b"].load_errors["/sql"] = AdapterNotFound("not on this machine")
        assert await cluster.generate("b", "sql") is None
        del cluster.engines["b"].load_errors["/sql"]
        assert await cluster.generate("b", "sql") == "/sql"

    run(tmp_path, test)


def test_a_replica_out_of_touch_serves_no_adapter(tmp_path):
    async def test(cluster):
        await cluster.load("a", "sql", "/sql")
        copies = cluster.replicas["a"]._front.copies
        copies.heard -= 100
        body = {"input_ids": [1], "lora_path": "sql"}
        status, answer = await cluster.call("a", "POST", "/generate", body)
        assert status == 503 and answer["error"]["code"] == "AdapterUnavailable"
        assert (await cluster.call("a", "POST", "/generate", {"input_ids": [1]}))[0] == 200

    run(tmp_path, test)


def test_adapters_of_the_start_and_weight_labels_are_the_clusters(tmp_path):
    async def test(cluster):
        assert list(cluster.engines["a"].loaded.values()) == ["/pinned"]
        assert await cluster.generate("b", "first") == "/first"
        status, _ = await cluster.call("a", "POST", "/update_weight_version", {"new_version": "step-2"})
        assert status == 200
        _, models = await cluster.call("b", "GET", "/v1/models")
        assert models["data"][0]["weight_version"] == "step-2"

    startup = [LoraPath("first", "/first"), LoraPath("held", "/pinned", True)]
    run(tmp_path, test, startup=startup)


def test_a_replica_that_comes_later_knows_everything_and_reports_what_it_has(tmp_path):
    async def test(cluster):
        await cluster.load("a", "sql", "/sql")
        await cluster.start("late")
        assert await cluster.generate("late", "sql") == "/sql"
        assert cluster.replicas["late"].report().report.load == 0
        assert cluster.replicas["late"].pressure() == 0
        cluster.replicas["late"].check()

    run(tmp_path, test, names="a")


def test_prompts_count_until_the_first_token(tmp_path):
    async def test(cluster):
        replica, engine = cluster.replicas["a"], cluster.engines["a"]
        engine.gate.clear()
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/generate",
            "raw_path": b"/generate", "query_string": b"", "root_path": "", "client": ("c", 1), "server": ("s", 1),
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        body = json.dumps({"input_ids": [1], "stream": True, "sampling_params": {"max_new_tokens": 4}}).encode()
        pieces = replica.handle(scope, body, 100)
        asking = asyncio.create_task(anext(pieces))
        while not engine.submitted:
            await asyncio.sleep(0.01)
        assert (replica.open_requests, replica.prompt_tokens) == (1, 100)
        assert replica.report().report.prompt == 100
        engine.gate.set()
        while not asgi_exchange.answers(await asking):
            asking = asyncio.create_task(anext(pieces))
        assert (replica.open_requests, replica.prompt_tokens) == (1, 0)
        await pieces.aclose()
        assert (replica.open_requests, replica.prompt_tokens) == (0, 0)

    run(tmp_path, test, names="a")


def test_tenants_are_charged_for_what_other_replicas_serve_them(tmp_path, monkeypatch):
    monkeypatch.setattr(replica_server, "SHARE_SECONDS", 0.02)
    (tmp_path / "keys").write_text(f'[keys.web]\nhash = "{write_hash("k" * 20, new_salt())}"\ntenant = "acme"\n')
    (tmp_path / "keys").chmod(0o600)

    async def test(cluster):
        served = {"a": 0.0, "b": 0.0}
        heard = {"a": 0.0, "b": 0.0}

        def engine_of(name):
            async def call(message):
                asked = message(0)
                heard[name] += asked.elsewhere.get("acme", 0.0)
                taken, served[name] = served[name], 0.0
                return Reply(call=0, served={"acme": taken} if taken else {})

            return call

        for name in "ab":
            cluster.engines[name].call = engine_of(name)
        await asyncio.sleep(0.1)
        served["a"], served["b"] = 40.0, 2.0
        while heard != {"a": 2.0, "b": 40.0}:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        assert heard == {"a": 2.0, "b": 40.0}

    run(tmp_path, test, auth_file=str(tmp_path / "keys"))


def test_hanging_up_ends_the_request(tmp_path):
    async def test(cluster):
        engine = cluster.engines["a"]
        engine.gate.clear()
        body = {"input_ids": [1], "stream": True, "sampling_params": {"max_new_tokens": 4}}
        asking = asyncio.create_task(cluster.call("a", "POST", "/generate", body))
        while not engine.submitted:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while not engine.aborted:
            await asyncio.sleep(0.01)
        assert engine.aborted == [engine.submitted[0].rid]

    run(tmp_path, test, names="a")


@pytest.mark.parametrize(("most", "expected"), [(100, b"abcdef"), (4, b"abcde")])
def test_a_body_is_read_whole_or_cut_where_it_is_seen_to_be_too_long(most, expected):
    messages = [{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.request", "body": b"def"}]

    async def receive():
        return messages.pop(0)

    assert asyncio.run(asgi_exchange.read_body(receive, most)) == expected


def test_an_error_of_the_application_ends_its_answer():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("broken")

    async def whole():
        return [some async for some in asgi_exchange.run(app, {}, b"")]

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(whole())
