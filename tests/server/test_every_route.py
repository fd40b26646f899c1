"""Every route with every kind of key: what the table says is what happens, and nothing of one tenant reaches another.

Two tenants, acme and zorg, have adapters, requests, a stored response and directories; the names of all that is
acme's hold a word that occurs nowhere else. No answer to zorg or to outsiders, on any route and however they ask, may
hold it.
"""

import asyncio
import re

import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import run
from fakes.tokenizers import byte_level_tokenizer
from keys import KeyedServer

from multilora.server.access_rules import RULES, Need

TOKEN = "xylophone"
"""Is in the name of everything that is acme's."""
TEXT = f"""
[tenants.acme]
roots = ["ROOT/{TOKEN}"]
[keys.acme-{TOKEN}]
tenant = "acme"
load = ["*"]
[keys.zorg]
tenant = "zorg"
load = ["*"]
[keys.reader]
tenant = "zorg"
use = ["common"]
[keys.ops]
admin = true
"""
ACME = f"acme-{TOKEN}"
GREEDY = {"max_new_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With an adapter of the operator's, of each tenant's, and a stored response of acme's."""
    folder = tmp_path_factory.mktemp("keys")
    root = folder / "root"
    for name in (f"{TOKEN}/sql", "zorg/sql"):
        path = root / name
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text("{}")
        (path / "adapter_model.safetensors").write_bytes(b"x")
    client = FakeEngineClient(vocab_size=320)
    s = KeyedServer(
        folder,
        TEXT.replace("ROOT", str(root)),
        client=client,
        tokenizer=byte_level_tokenizer(),
        lora_root=(str(root),),
    )
    s.load("common")
    body = {"lora_name": f"{TOKEN}-sql", "lora_path": str(root / TOKEN / "sql"), "weight_version": f"{TOKEN}-1"}
    assert s.post("/load_lora_adapter", body, key=ACME).status == 200
    assert s.post("/load_lora_adapter", {"lora_name": "sql", "lora_path": "sql"}, key="zorg").status == 200
    parts = [{"name": f"{TOKEN}-sql", "weight": 2}, {"name": "common"}]
    mix = {"lora_name": f"{TOKEN}-mix", "lora_path": parts}
    assert s.post("/load_lora_adapter", mix, key=ACME).status == 200
    asked = {"model": f"{TOKEN}-sql", "input": f"the {TOKEN}", "max_output_tokens": 2}
    s.response = s.post("/v1/responses", asked, key=ACME).json()
    assert s.response["status"] in ("completed", "incomplete")
    s.before = state(s)
    return s


def state(s):
    """What nobody but acme and the admin may change."""
    names = [(ref.name, ref.version, ref.pinned) for ref in s.registry.refs() if ref.name != "zorg:sql"]
    stored = s.get(f"/v1/responses/{s.response['id']}", key=ACME)
    return names, stored.text, s.client.flushes, len(s.client.calls), s.client.profiling


def bodies():
    """Bodies that name what is acme's in every field that could, for any route."""
    names = [f"{TOKEN}-sql", f"base:acme:{TOKEN}-sql", f"{TOKEN}-mix"]
    for name in names:
        yield {
            "model": name,
            "lora_path": name,
            "lora_name": name,
            "input_ids": [5],
            "prompt": "x",
            "messages": [{"role": "user", "content": "x"}],
            "input": "x",
            "max_tokens": 2,
            "token_ids": [5],
            "tokens": [5],
            "rid": "mine",
            "request_ids": ["mine"],
            "request_id": "mine",
            "new_version": "v",
            "config_dict": {},
            "serialized_tensors": "AAAA",
        }


def fields_of(s, path):
    """The fields that the route's body has."""
    document = s.app.openapi()
    post = document["paths"].get(path.replace(":path", ""), {}).get("post", {})
    schema = post.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    schema = next((part for part in (schema, *schema.get("anyOf", ())) if "$ref" in part), None)
    if schema is None:
        return set()
    return set(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"])


def requests(s, path):
    """(method, path, body) of all the ways to ask there."""
    places = {
        "{response_id}": [s.response["id"], "resp_0"],
        "{name:path}": [f"{TOKEN}-sql", f"acme:{TOKEN}-sql", f"base:{TOKEN}-sql", "sql"],
    }
    pattern = re.search(r"\{.*?\}", path)
    paths = [path] if pattern is None else [path.replace(pattern.group(), name) for name in places[pattern.group()]]
    own = fields_of(s, path)
    for place in paths:
        yield "GET", place, None
        yield "DELETE", place, None
        yield "POST", place, None
        yield "POST", place, {}
        for body in bodies():
            yield "POST", place, {name: value for name, value in body.items() if name in own}


def said(answer, sent):
    """The answer without what it repeats of the request."""
    text = answer.text + str(answer.headers)
    for value in set(re.findall(r"[\w:./-]*" + TOKEN + r"[\w:./-]*", str(sent))):
        for part in (value, value.rpartition("/")[2], value.removeprefix("base:")):
            text = text.replace(part, "")
    return text


@pytest.mark.parametrize("path", list(RULES))
def test_without_a_key(server, path):
    async def scenario():
        for method, place, body in requests(server, path):
            for headers in ({}, {"authorization": "Bearer wrong"}):
                answer = await server.send(method, place, body, **headers)
                if RULES[path].need is not Need.NOTHING:
                    assert answer.status == 401, (method, place)
                assert TOKEN not in said(answer, (place, body))

    run(scenario())
    assert state(server) == server.before


@pytest.mark.parametrize("path", list(RULES))
def test_what_a_tenants_key_may(server, path):
    """zorg's keys are refused by 403 exactly where the table says so, and nothing of acme's is said or changed."""
    need = RULES[path].need

    async def scenario():
        for method, place, body in requests(server, path):
            for key in ("zorg", "reader"):
                answer = await server.send(method, place, body, key=key)
                barred = need in (Need.ADMIN, Need.OBSERVES) or (need is Need.LOADS and key == "reader")
                if barred:
                    assert answer.status == 403, (method, place, key)
                elif need not in (Need.LOADS, Need.ABORTS):
                    assert answer.status not in (401, 403), (method, place, key, answer.text)
                assert answer.status < 500 or answer.status == 503, (place, body, answer.text)
                assert TOKEN not in said(answer, (place, body)), (method, place, body, answer.text)
        if need is Need.LOADS and "unload" in path:
            await server.send("POST", "/load_lora_adapter", {"lora_name": "sql", "lora_path": "sql"}, key="zorg")

    run(scenario())
    assert state(server) == server.before


@pytest.mark.parametrize("path", [path for path, rule in RULES.items() if rule.need is Need.KEY])
def test_what_is_not_there_and_what_is_anothers_look_the_same(server, path):
    """The same question about acme's and about what never was: answers are equal but for the name."""

    async def scenario():
        for method, place, body in requests(server, path):
            if server.response["id"] in place or body == {}:
                continue
            for key in ("zorg", "reader"):
                real = await server.send(method, place, body, key=key)
                other = (place.replace(TOKEN, "x" * len(TOKEN)), _renamed(body))
                never = await server.send(method, *other, key=key)
                assert (real.status, _shape(real)) == (never.status, _shape(never)), (method, place, body)

    run(scenario())


def _renamed(value):
    if isinstance(value, dict):
        return {name: _renamed(item) for name, item in value.items()}
    return value.replace(TOKEN, "x" * len(TOKEN)) if isinstance(value, str) else value


def _shape(answer):
    """The answer without numbers, ids and names."""
    return re.sub(r"\d+|[0-9a-f]{8,}", "#", answer.text.replace(TOKEN, "x" * len(TOKEN)))


@pytest.mark.parametrize("path", [path for path, rule in RULES.items() if rule.need is not Need.NOTHING])
def test_the_admin_and_the_tenant_itself_are_let_in(server, path):
    async def scenario():
        method = "GET" if path in ("/metrics", "/v1/models") or path.startswith(("/docs", "/redoc")) else "POST"
        place = re.sub(r"\{.*?\}", "nothing", path)
        assert (await server.send(method, place, {"rid": "nobody's"}, key="ops")).status not in (401, 403)
        if RULES[path].need in (Need.KEY, Need.LOADS, Need.SCRAPE):
            assert (await server.send(method, place, {}, key=ACME)).status not in (401, 403)

    run(scenario())


def test_paths_that_are_written_otherwise_open_nothing(server):
    """However a path is spelled: either the router knows it and its rule holds, or there is nothing there."""
    flushes = server.client.flushes

    async def scenario():
        for path in ("/flush_cache", "/pause", "/abort_request", "/metrics", "/server_info"):
            ways = (path + "/", "/" + path, path.upper(), path + "//", "/." + path, path + ";x", path + "?x=/health")
            for way in (*ways, "/health/.." + path, path + "/../health", path + "%2f"):
                for method in ("POST", "GET", "HEAD", "PUT", "PATCH", "TRACE"):
                    answer = await server.send(method, way, {})
                    assert answer.status in (401, 404, 405, 307), (method, way, answer.status)

    run(scenario())
    assert server.client.flushes == flushes
    assert not server.driver.front.pauses.paused


def test_a_running_request_of_another_tenant_stays(server):
    client = server.client
    client.gate.clear()

    async def scenario():
        body = {"input_ids": [5], "sampling_params": GREEDY, "rid": "mine", "stream": True}
        stream = server.connect("POST", "/generate", body, key=ACME)
        count = len(client.submitted)
        while len(client.submitted) == count:
            await asyncio.sleep(0)
        before = list(client.aborted)
        for path in ("/abort_request", "/abort_requests", "/inference/v1/abort_requests"):
            for rid in ("mine", client.submitted[-1].rid, "acme\nmine", "acme:mine"):
                for key in ("zorg", "reader"):
                    await server.send("POST", path, {"rid": rid, "request_ids": [rid]}, key=key)
        assert client.aborted == before
        client.gate.set()
        assert (await stream.answer()).status == 200

    run(scenario())
