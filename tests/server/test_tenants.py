"""Two tenants on one server: neither learns, uses or changes what is the other's.

Covers `auth.py`, `server_info.py`, `metrics/tenant_view.py` too.
"""

import asyncio
import base64

import msgspec
import pytest
from fakes.models import FakeEngineClient
from fakes.server_app import LocalServer, run
from fakes.tokenizers import byte_level_tokenizer
from keys import BOTH_TENANTS, KeyedServer, write_keys
from safetensors.numpy import save

from multilora.engine.messages import AdapterStats
from multilora.front.state_directory import open_state

GREEDY = {"max_new_tokens": 4, "temperature": 0}


@pytest.fixture
def roots(tmp_path):
    """A --lora-root with an adapter "sql" of each tenant's, and one that is nobody's."""
    for folder in ("acme/sql", "zorg/sql", "zorg/secret", "shared"):
        path = tmp_path / "root" / folder
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text("{}")
        (path / "adapter_model.safetensors").write_bytes(folder.encode())
    return tmp_path / "root"


@pytest.fixture
def server(tmp_path, roots):
    s = KeyedServer(tmp_path, lora_root=(str(roots),))
    s.load("common")
    return s


def load(s, key, name="sql", path="sql", **more):
    return s.post("/load_lora_adapter", {"lora_name": name, "lora_path": path} | more, key=key)


def generate(s, key, **body):
    return s.post("/generate", {"input_ids": [5, 6], "sampling_params": GREEDY} | body, key=key)


def names(s, key):
    return [card["id"] for card in s.get("/v1/models", key=key).json()["data"]]


def test_each_tenant_has_its_own_adapter_of_a_name(server):
    for key in ("acme", "zorg"):
        assert load(server, key).status == 200
        assert names(server, key) == ["base", "common", "sql"]
    assert names(server, "ops") == ["base", "common", "acme:sql", "zorg:sql"]
    versions = {}
    for key in ("acme", "zorg"):
        for body in ({"lora_path": "sql"}, {"model": "sql"}, {"model": "base:sql"}, {"lora_path": [{"name": "sql"}]}):
            assert generate(server, key, **body).status == 200
        versions[key] = {message.adapters for message in server.client.submitted[-4:]}
        assert len(versions[key]) == 1
    assert versions["acme"] != versions["zorg"]
    assert generate(server, "ops", lora_path="zorg:sql").status == 200
    assert {server.client.submitted[-1].adapters} == versions["zorg"]


def test_an_adapter_of_another_tenant_is_as_one_that_never_was(server):
    assert load(server, "zorg", "secret", "secret").status == 200
    for name in ("secret", "zorg:secret"):
        for body in (
            {"lora_path": "NAME"},
            {"model": "NAME"},
            {"model": "base:NAME"},
            {"lora_path": [{"name": "NAME"}]},
        ):
            real, fake = (
                generate(
                    server, "acme", **msgspec.json.decode(msgspec.json.encode(body).replace(b"NAME", n.encode()))
                )
                for n in (name, name.replace("secret", "nothing"))
            )
            assert real.status == fake.status != 200
            assert real.text.replace("secret", "nothing") == fake.text
        for path in (f"/v1/models/{name}", f"/v1/models/base:{name}"):
            assert server.get(path, key="acme").status == 404
    for path, body in (
        ("/unload_lora_adapter", {"lora_name": "secret"}),
        ("/v1/unload_lora_adapter", {"lora_name": "secret"}),
        ("/load_lora_adapter", {"lora_name": "mix", "lora_path": [{"name": "secret"}]}),
        ("/tokenize", {"model": "secret", "prompt": "x"}),
    ):
        answer = server.post(path, body, key="acme")
        assert answer.status in (400, 404)
        assert "zorg" not in answer.text
    assert generate(server, "zorg", lora_path="secret").status == 200


def test_a_tenant_changes_only_its_own(server):
    load(server, "acme")
    load(server, "zorg")
    assert load(server, "acme").status == 400, "already loaded, its own"
    assert load(server, "acme", upsert=True).status == 200
    assert server.post("/unload_lora_adapter", {"lora_name": "common"}, key="acme").status == 400
    assert server.post("/unload_lora_adapter", {"lora_name": "zorg:sql"}, key="acme").status == 400
    answer = server.post("/unload_lora_adapter", {"lora_name": "sql"}, key="acme")
    assert answer.json()["loaded_adapters"] == {"common": "common"}
    assert names(server, "ops") == ["base", "common", "zorg:sql"]
    assert server.post("/unload_lora_adapter", {"lora_name": "zorg:sql"}, key="ops").status == 200
    assert names(server, "zorg") == ["base", "common"]


def test_the_admin_loads_for_a_tenant(tmp_path):
    s = KeyedServer(tmp_path)
    assert load(s, "ops", "acme:given", "/anywhere").status == 200
    assert names(s, "acme") == ["base", "given"]
    assert names(s, "zorg") == ["base"]
    assert load(s, "ops", "nobody:given", "/anywhere").status == 400


def test_a_tenants_own_name_comes_before_the_operators(server):
    before = generate(server, "acme", lora_path="common")
    assert load(server, "acme", "common").status == 200
    assert names(server, "acme") == ["base", "common"]
    generate(server, "acme", lora_path="common")
    own = server.client.submitted[-1].adapters
    generate(server, "zorg", lora_path="common")
    assert server.client.submitted[-1].adapters != own
    assert before.status == 200
    server.post("/unload_lora_adapter", {"lora_name": "common"}, key="acme")
    assert generate(server, "acme", lora_path="common").status == 200


@pytest.mark.parametrize(
    "path", ["../zorg/secret", "secret", "ROOT/zorg/secret", "ROOT/acme/../zorg/secret", "ROOT", "."]
)
def test_no_path_leads_to_another_tenants_files(server, roots, path):
    answer = load(server, "acme", "x", path.replace("ROOT", str(roots)))
    assert answer.status == 400
    assert "there is none among the directories" in answer.json()["error_message"]
    assert names(server, "acme") == ["base", "common"]


def test_no_link_leads_there_either(server, roots):
    (roots / "acme/link").symlink_to(roots / "zorg/secret")
    (roots / "acme/sly").mkdir()
    (roots / "acme/sly/adapter_config.json").write_text("{}")
    (roots / "acme/sly/adapter_model.safetensors").symlink_to(roots / "zorg/secret/adapter_model.safetensors")
    for path in ("link", "sly"):
        assert load(server, "acme", "x", path).status == 400
    assert load(server, "acme", "x", str(roots / "acme/sql")).status == 200, "by its whole path, too"


def test_patterns_of_a_key(tmp_path, roots):
    text = """
[keys.app]
tenant = "acme"
use = ["sql-*"]
[keys.trainer]
tenant = "acme"
load = ["sql-*"]
see = []
"""
    s = KeyedServer(tmp_path, text, lora_root=(str(roots),))
    s.load("chat", "sql-shared")
    answer = load(s, "app", "sql-1")
    assert (answer.status, answer.error["code"], answer.error["type"]) == (403, "Forbidden", "permission_error")
    assert load(s, "trainer", "chat-1").status == 403
    assert load(s, "trainer", "sql-1").status == 200
    assert load(s, "trainer", "sql-1", pinned=True, upsert=True).status == 403
    assert names(s, "app") == ["base", "sql-shared", "sql-1"]
    assert names(s, "trainer") == ["base"]
    assert generate(s, "app", lora_path="sql-1").status == 200
    assert generate(s, "app", lora_path="chat").status == 400
    assert generate(s, "trainer", lora_path="chat").status == 200
    for path in ("/flush_cache", "/pause", "/sleep", "/start_profile", "/update_weight_version"):
        assert s.post(path, {}, key="trainer").status == 403
    assert s.get("/load", key="trainer").status == 403


def test_requests_are_named_within_a_tenant(server):
    client = server.client
    client.gate = asyncio.Event()

    async def scenario():
        body = {"input_ids": [5], "sampling_params": GREEDY, "rid": "same", "stream": True}
        streams = [server.connect("POST", "/generate", body, key=key) for key in ("acme", "zorg", "ops")]
        while len(client.submitted) < 3:
            await asyncio.sleep(0)
        assert len({message.rid for message in client.submitted}) == 3
        for key in ("acme", "zorg"):
            for everything in ({"abort_all": True}, {}):
                path = "/abort_request" if everything else "/abort_requests"
                assert (await server.send("POST", path, everything, key=key)).status == 403
        assert client.aborted == []
        twice = await server.send("POST", "/generate", body, key="acme")
        assert (twice.status, twice.error["param"]) == (400, "rid")
        answer = await server.send("POST", "/abort_requests", {"request_ids": ["same"]}, key="acme")
        assert answer.json()["aborted"] == 1
        assert client.aborted == [client.submitted[0].rid]
        answer = await server.send("POST", "/abort_requests", {"request_ids": ["same"]}, key="ops")
        assert answer.json()["aborted"] >= 2
        client.gate.set()
        for stream in streams:
            await stream.answer()

    run(scenario())


def test_prefixes_are_not_shared_between_tenants(server):
    for key in ("acme", "zorg", "ops"):
        for salt in ({}, {"cache_salt": "acme"}):
            assert generate(server, key, **salt).status == 200
    salts = [message.salt for message in server.client.submitted]
    assert len(set(salts)) == 6
    assert salts[0].startswith("acme\n")
    assert [message.tenant for message in server.client.submitted] == ["acme"] * 2 + ["zorg"] * 2 + [""] * 2


def test_responses_are_their_tenants(tmp_path):
    s = KeyedServer(tmp_path, client=FakeEngineClient(vocab_size=320), tokenizer=byte_level_tokenizer())
    created = s.post("/v1/responses", {"input": "hello", "max_output_tokens": 2}, key="acme").json()
    path, item = f"/v1/responses/{created['id']}", created["output"][0]["id"]
    assert s.get(path, key="acme").status == 200
    reference = {"input": [{"type": "item_reference", "id": item}], "max_output_tokens": 2}
    following = {"input": "x", "previous_response_id": created["id"], "max_output_tokens": 2}
    for key in ("zorg", "ops"):
        assert s.get(path, key=key).status == 404
        assert s.post(f"{path}/cancel", key=key).status == 404
        assert run(s.send("DELETE", path, key=key)).status == 404
        assert s.post("/v1/responses", following, key=key).error["code"] == "previous_response_not_found"
        assert s.post("/v1/responses", reference, key=key).status == 400
    for body in (following, reference):
        assert s.post("/v1/responses", body, key="acme").status == 200
    assert run(s.send("DELETE", path, key="acme")).status == 200


def test_server_info_says_nothing_of_others(server, roots):
    load(server, "zorg", "secret", "secret")
    load(server, "acme")
    text = server.get("/server_info", key="acme").text
    info = server.get("/server_info", key="acme").json()
    assert "zorg" not in text
    assert str(roots) not in text
    assert "keys.toml" not in text
    assert [(a["lora_name"], a["lora_path"]) for a in info["loaded_adapters"]] == [
        ("common", "common"),
        ("sql", "sql"),
    ]
    assert "active_requests" not in info["loaded_adapters"][0]
    assert info["loaded_adapters"][1]["active_requests"] == 0
    assert set(info["internal_states"][0]) == {"effective_max_running_requests_per_dp", "dp_size", "tp_size"}
    everything = server.get("/server_info", key="ops").json()
    assert [a["lora_name"] for a in everything["loaded_adapters"]] == ["common", "zorg:secret", "acme:sql"]
    assert everything["lora_root"] == [str(roots)]
    assert "blake2b" not in server.get("/server_info", key="ops").text


def test_metrics_of_a_tenant(server):
    load(server, "zorg", "secret", "secret")
    load(server, "acme")
    for key, name in (("acme", "sql"), ("zorg", "secret"), ("acme", "common"), ("zorg", None)):
        assert generate(server, key, lora_path=name).status == 200
    known = {"level": "device", "pinned": False, "rank": 8, "load_seconds": 0.5}
    zero = dict.fromkeys((f for f in AdapterStats.__struct_fields__ if f not in known), 0)
    stats = [AdapterStats(**(zero | known | {"version": ref.version})) for ref in server.registry.refs()]
    server.client.stats = msgspec.structs.replace(server.client.stats, adapters=stats)
    assert server.get("/metrics").status == 401
    own, everything = (server.get("/metrics", key=key).text for key in ("acme", "ops"))
    for text in ("secret", "zorg", "common", "acme:", "num_requests_running", "http_requests"):
        assert text not in own
        assert text in everything
    assert 'multilora:requests_started_total{adapter_name="sql"} 1.0' in own
    assert 'vllm:lora_adapter_loaded{adapter_name="sql"' in own
    for name, count in {"acme": 2, "zorg": 2}.items():
        assert f'multilora:tenant_requests_started_total{{tenant="{name}"}} {count}.0' in everything
    assert 'multilora:tenant_requests_started_total{tenant="acme"} 2.0' in own


def test_what_has_no_label_is_shown_to_no_tenant(server, monkeypatch):
    monkeypatch.setattr("multilora.server.metrics.top_names.RANK_SECONDS", 0.0)
    observer = server.app.state.driver.front.observer
    for names in (observer._adapters, observer._tenants):
        names._limit = 1
    load(server, "zorg", "secret", "secret")
    load(server, "acme")
    own = []
    for key, name, times in (("acme", "sql", 1), ("zorg", "secret", 9), ("acme", "sql", 90)):
        for _ in range(times):
            assert generate(server, key, lora_path=name).status == 200
        own.append(server.get("/metrics", key="acme").text)
        for text in ("secret", "zorg", "other", "retired"):
            assert text not in own[-1]
    assert 'tenant_requests_started_total{tenant="acme"} 1.0' in own[0]
    assert "tenant_requests" not in own[1], "another tenant has the only label"
    everything = server.get("/metrics", key="ops").text
    assert 'multilora:tenant_requests_started_total{tenant="retired"}' in everything


@pytest.mark.parametrize("name", ["other", "retired"])
def test_a_tenant_that_is_called_what_several_are_sees_nothing_of_them(tmp_path, name):
    s = KeyedServer(tmp_path, f'{BOTH_TENANTS}\n[keys.x]\ntenant = "{name}"', max_metrics_labels=1)
    for key in ("acme", "zorg", "x"):
        assert generate(s, key).status == 200
    assert "multilora:tenant_" not in s.get("/metrics", key="x").text
    assert 'tenant="acme"' in s.get("/metrics", key="ops").text


def test_a_file_that_is_read_again_holds_at_once(server):
    assert names(server, "acme") == ["base", "common"]
    write_keys(server.path, '[keys.acme]\ntenant = "acme"\nuse = ["x"]\n[keys.new]\ntenant = "new"')
    server.app.state.keys.reload()
    assert names(server, "acme") == ["base"]
    assert names(server, "new") == ["base", "common"]
    assert server.get("/v1/models", key="zorg").status == 401
    server.path.write_text("")
    server.app.state.keys.reload()
    assert names(server, "acme") == ["base"]


def test_limits_answer_429_with_retry_after(tmp_path, roots):
    text = """
[keys.slow]
tenant = "acme"
requests_per_minute = 2
[keys.few]
tenant = "zorg"
load = ["*"]
concurrency = 2
tokens_per_minute = 8
[keys.ops]
admin = true
[adapters."common"]
requests_per_minute = 1
"""
    s = KeyedServer(tmp_path, text, lora_root=(str(roots),))
    s.load("common")
    assert [s.get("/v1/models", key="slow").status for _ in range(3)] == [200, 200, 429]
    answer = s.post("/v1/messages", {}, key="slow")
    assert (answer.status, answer.headers["retry-after"]) == (429, "30")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert [generate(s, "ops", lora_path="common").status for _ in range(2)] == [200, 429]
    assert generate(s, "few", input_ids=[[5]] * 3).status == 400
    assert generate(s, "few", input_ids=[[5]] * 2).status == 200
    answer = generate(s, "few")
    assert (answer.status, answer.error["code"], answer.error["type"]) == (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
    )
    assert int(answer.headers["retry-after"]) > 0
    assert not any(account.running for account in s.driver.front.quotas._accounts.values())


def test_a_tenant_has_only_so_many_adapters(tmp_path, roots):
    text = '[tenants.zorg]\nmax_adapters = 1\n[keys.zorg]\ntenant = "zorg"\nload = ["*"]\n' + (
        '[keys.acme]\ntenant = "acme"\nload = ["*"]\n'
    )
    s = KeyedServer(tmp_path, text, lora_root=(str(roots),), max_loras_per_tenant=2)
    for key, most in (("zorg", 1), ("acme", 2)):
        for number in range(most):
            assert load(s, key, f"a{number}").status == 200
        mix = [{"name": "a0", "weight": 2}]
        for more in ({"name": "b"}, {"name": "mix", "path": mix}):
            answer = load(s, key, **more)
            assert (answer.status, f"{most} at most" in answer.text) == (403, True)
        assert load(s, key, "a0", upsert=True).status == 200
        s.post("/unload_lora_adapter", {"lora_name": "a0"}, key=key)
        assert load(s, key, "b").status == 200


def test_the_spool_is_bounded_for_each_tenant(tmp_path, roots):
    import numpy

    text = '[tenants.zorg]\nspool_bytes = 9\n[keys.zorg]\ntenant = "zorg"\nload = ["*"]\n' + (
        '[keys.acme]\ntenant = "acme"\nload = ["*"]\n'
    )
    s = KeyedServer(tmp_path, text, lora_root=(str(roots),), lora_spool_bytes=20_000)
    weights = base64.b64encode(save({"x": numpy.zeros(2_000, "float32")})).decode()

    def tensors(key, name):
        body = {"lora_name": name, "config_dict": {}, "serialized_tensors": weights}
        return s.post("/load_lora_adapter_from_tensors", body, key=key).status

    assert [tensors("acme", name) for name in "abc"] == [200, 200, 403]
    assert tensors("zorg", "a") == 403
    assert load(s, "zorg").status == 403
    s.post("/unload_lora_adapter", {"lora_name": "a"}, key="acme")
    assert [tensors("acme", name) for name in "cd"] == [200, 403]
    assert s.spool.taken("zorg") == 0
    assert 10_000 < s.spool.taken("acme") < 20_000
    kept = sorted(path.name for path in s.spool.root.iterdir())
    assert len(kept) == 2
    shared = {"lora_name": "s", "config_dict": {}, "tensors": [], "load_format": "shared_memory"}
    assert s.post("/load_lora_adapter_from_tensors", shared, key="acme").status == 403


def test_a_tenants_adapters_outlast_the_server(tmp_path, roots):
    def start():
        records, spool = open_state(str(tmp_path / "state"))
        s = KeyedServer(tmp_path, state=(records, spool), lora_root=(str(roots),), lora_spool_bytes=25)
        run(s.driver.change(s.driver.front.load_at_start()))
        return s, records

    def cards(s):
        found = s.get("/v1/models", key="acme").json()["data"]
        return [(card["id"], card["root"], card["version"]) for card in found]

    s, records = start()
    assert load(s, "acme").status == 200
    assert load(s, "acme", "mix", [{"name": "sql", "weight": 2}]).status == 200
    assert load(s, "zorg", "secret", "secret").status == 200
    before = cards(s)
    records.close()
    s, records = start()
    assert cards(s) == before
    assert names(s, "zorg") == ["base", "secret"]
    assert s.spool.taken("acme") == 10
    assert [load(s, "acme", name).status for name in "ab"] == [200, 403], "what is there from before counts"
    assert s.post("/unload_lora_adapter", {"lora_name": "mix"}, key="acme").status == 200
    kept = next(path for path in s.spool.root.iterdir() if path.name == "1")
    records.close()
    for file in kept.iterdir():
        file.unlink()
    kept.rmdir()
    (roots / "acme/sql").rename(roots / "acme/moved")
    (tmp_path / "sql").mkdir()  # where another could be found from
    s, records = start()
    assert names(s, "acme") == ["base", "a"], "its files are gone, and none are looked for elsewhere"
    assert s.post("/unload_lora_adapter", {"lora_name": "sql"}, key="acme").status == 200
    records.close()
    write_keys(s.path, '[keys.zorg]\ntenant = "zorg"')
    records, spool = open_state(str(tmp_path / "state"))
    s = LocalServer(FakeEngineClient(), None, state=(records, spool), auth_file=str(s.path), lora_root=(str(roots),))
    run(s.driver.change(s.driver.front.load_at_start()))
    assert list(s.registry.loaded()) == ["zorg:secret"], "acme is no tenant any more"
