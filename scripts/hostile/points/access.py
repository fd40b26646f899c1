"""Points 16, 17 and 19: keys, what each may do, and the document that says so."""

import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from multilora.server.key_hash import write_hash
from scripts.hostile.points.adapters import PATHS, from_tensors, silent_host
from scripts.hostile.points.record import LONG, PROMPT, Record, ask, processes, requests, until
from scripts.hostile.target import Target, own_server


def refused(*arguments: str, env: dict[str, str] | None = None) -> tuple[int | str, str, float]:
    """Exit code, last line of stderr and seconds of a server that should not start."""
    command = [sys.executable, "-m", "multilora", "serve", "--device", "cpu", "--port", "0", *arguments]
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), timeout=30)
    except subprocess.TimeoutExpired:
        return "it serves", "", 30.0
    said = done.stderr.strip()
    return done.returncode, "traceback" if "Traceback" in said else said.splitlines()[-1], time.monotonic() - start


@processes(16, "empty and odd keys")
def empty_keys(record: Record) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".key") as empty:
        tries: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
            ('--api-key ""', ("--api-key", ""), {}),
            ('--admin-api-key ""', ("--admin-api-key", ""), {}),
            ('--metrics-key ""', ("--metrics-key", ""), {}),
            ("--api-key ключ", ("--api-key", "ключ"), {}),
            ('--api-key " "', ("--api-key", " "), {}),
            ("--api-key with a line's end", ("--api-key", "a\nb"), {}),
            ("MULTILORA_API_KEY=", (), {"MULTILORA_API_KEY": ""}),
            ("MULTILORA_ADMIN_API_KEY=", (), {"MULTILORA_ADMIN_API_KEY": ""}),
            ("--api-key-file of an empty file", ("--api-key-file", empty.name), {}),
            ("--auth-file of an empty file", ("--auth-file", empty.name), {}),
            ("--auth-file that is not there", ("--auth-file", empty.name + "x"), {}),
        ]
        for name, arguments, env in tries:
            code, line, took = refused(*arguments, env=env)
            record.note(name, f"exit {code} after {took:.1f} s: {line[:90]}", code == 2 and line != "traceback")


KEYS = {"ops": "admin = true", "acme": 'tenant = "acme"\nload = ["*"]', "zorg": 'tenant = "zorg"'}


def write_keys(path: Path) -> dict[str, str]:
    keys = {name: f"ml-{secrets.token_hex(16)}" for name in KEYS}
    lines = [
        f'[keys.{name}]\nhash = "{write_hash(keys[name], os.urandom(16))}"\n{text}' for name, text in KEYS.items()
    ]
    path.write_text("\n".join(lines) + "\n")
    return keys


@processes(17, "what a normal key may not do")
def normal_key(record: Record) -> None:
    with tempfile.TemporaryDirectory(prefix="points-") as folder, silent_host() as hub:
        keys = write_keys(Path(folder) / "keys.toml")
        flags = (
            "--enable-lora",
            "--auth-file",
            f"{folder}/keys.toml",
            "--lora-root",
            folder,
            "--lora-spool-bytes",
            "1MB",
        )
        env = {"HF_ENDPOINT": hub}
        with own_server(record.log, "--device", "cpu", *flags, *record.servers, env=env) as target:
            _tenants(target, record, keys)
    with own_server(
        record.log, "--device", "cpu", "--api-key", "user", "--admin-api-key", "ops", *record.servers
    ) as target:
        _two_keys(target, record)
    log = Path(tempfile.mkstemp()[1])
    with own_server(str(log), "--device", "cpu", "--admin-api-key", "ops", *record.servers) as target:
        status = ask(target, "POST", "/generate", {"text": "a"}).status_code
        warned = any("WARNING" in line and "admin" in line for line in log.read_text().splitlines())
        record.expect("--admin-api-key alone: /generate, a warning at the start", (status, warned), (200, True))
    log.unlink()


def _tenants(target: Target, record: Record, keys: dict[str, str]) -> None:
    acme, zorg = keys["acme"], keys["zorg"]
    body = {"text": PROMPT, "rid": "mine", "sampling_params": LONG}
    thread = threading.Thread(target=ask, args=(target, "POST", "/generate", body, acme))
    thread.start()
    until(lambda: ask(target, "GET", "/load", key=keys["ops"]).text == '{"server_load":1}', 20)
    tries: list[tuple[str, str, str, object, tuple[int, ...]]] = [
        ("abort_all", zorg, "/abort_request", {"abort_all": True}, (403,)),
        ("another's rid", zorg, "/abort_request", {"rid": "mine"}, (200, 404)),
        ("load", zorg, "/load_lora_adapter", {"lora_name": "x", "lora_path": PATHS["json"]}, (403,)),
        ("a directory outside", acme, "/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, (400, 403, 404)),
        ("..", acme, "/load_lora_adapter", {"lora_name": "x", "lora_path": "../../etc"}, (400, 403, 404)),
        ("a hub repository", acme, "/load_lora_adapter", {"lora_name": "x", "lora_path": "org/x"}, (400, 403, 404)),
        ("unload another's", acme, "/unload_lora_adapter", {"lora_name": "zorg:x"}, (400, 403, 404)),
        ("POST /flush_cache", acme, "/flush_cache", None, (403,)),
        ("/pause", acme, "/pause", None, (403,)),
        ("/sleep", acme, "/sleep", None, (403,)),
    ]
    for name, key, path, fields, wanted in tries:
        record.expect(f"tenant's key, {name}", ask(target, "POST", path, fields, key).status_code, *wanted)
    record.expect("GET /flush_cache", ask(target, "GET", "/flush_cache", key=keys["ops"]).status_code, 405)
    left = ask(target, "GET", "/load", key=keys["ops"]).text
    record.expect("the other's request runs on", left, '{"server_load":1}')
    record.expect(
        "its own tenant ends it", ask(target, "POST", "/abort_request", {"rid": "mine"}, acme).status_code, 200
    )
    thread.join()
    statuses = [from_tensors(target, f"t{i}", Path(PATHS["json"]), acme).status_code for i in range(20)]
    record.note("20 × tensors with --lora-spool-bytes 1MB", statuses, 403 in statuses and set(statuses) <= {200, 403})


def _two_keys(target: Target, record: Record) -> None:
    body = {"lora_name": "x", "lora_path": PATHS["json"]}
    for path, fields in (
        ("/load_lora_adapter", body),
        ("/unload_lora_adapter", {"lora_name": "x"}),
        ("/abort_request", {"abort_all": True}),
        ("/flush_cache", None),
        ("/load_lora_adapter_from_tensors", body),
    ):
        got = [ask(target, "POST", path, fields, key).status_code for key in (None, "wrong", "user")]
        record.expect(f"{path} with no key, a wrong one, a user's", got, [401, 401, 401], [401, 401, 403])
    for twist in (
        "//load_lora_adapter",
        "/load_lora_adapter/",
        "/%6coad_lora_adapter",
        "/LOAD_lora_adapter",
        "/x/../load_lora_adapter",
    ):
        record.expect(f"POST {twist}", ask(target, "POST", twist, body, "user").status_code, 401, 403, 404, 405, 307)


@requests(19, "/openapi.json")
def document(target: Target, record: Record) -> None:
    found = ask(target, "GET", "/openapi.json").json()
    operations = [(f"{m} {p}", o) for p, item in found["paths"].items() for m, o in item.items()]
    bare = [n for n, o in operations if _bare(o.get("responses", {}).get("200", {}))]
    record.expect(f"200 answers of {len(operations)} operations without a schema", bare, [])
    posts = [(n, o) for n, o in operations if n.startswith("post") and o.get("requestBody")]
    record.expect("bodies without an error answer", [n for n, o in posts if "400" not in o["responses"]], [])
    streams = [n for n, o in operations if "text/event-stream" in o["responses"].get("200", {}).get("content", {})]
    record.note("event streams", len(streams), "post /generate" in streams)
    schemas = found["components"]["schemas"]
    fields = {f"{s}.{f}": v for s, one in schemas.items() for f, v in one.get("properties", {}).items()}
    record.note("sampling_params and config_dict", "have fields", "SamplingParams" in schemas)
    bounded = sum("minimum" in str(v) or "maximum" in str(v) or "maxLength" in str(v) for v in fields.values())
    described = sum("description" in v for v in fields.values())
    record.note(f"of {len(fields)} fields", f"{described} described, {bounded} bounded", described * 2 > len(fields))
    record.note("security schemes", list(found["components"].get("securitySchemes", {})), True)


def _bare(answer: dict[str, object]) -> bool:
    content = answer.get("content", {})
    assert isinstance(content, dict)
    return any(one.get("schema") in ({}, None) for one in content.values())
