"""Points 6, 10, 11 and 18: loads, unloads, and what they wait for."""

import base64
import contextlib
import json
import os
import resource
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import torch

from multilora.demo import adapter_paths
from scripts.hostile.points.record import (
    LONG,
    PROMPT,
    TIGHT,
    Record,
    ask,
    generate,
    head,
    idle,
    processes,
    requests,
    said,
    until,
)
from scripts.hostile.target import Target, own_server

PATHS = {name: str(path) for name, path in adapter_paths().items()}
LOADER = "multilora.adapters.loading"
FLOOD: dict[str, object] = {"max_new_tokens": 400, "ignore_eos": True}


def load(target: Target, name: str, path: str | None = None, timeout: float = 60, **fields: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path or PATHS[name], **fields}
    return ask(target, "POST", "/load_lora_adapter", body, timeout=timeout)


def unload(target: Target, name: str) -> httpx.Response:
    return ask(target, "POST", "/unload_lora_adapter", {"lora_name": name})


def from_tensors(target: Target, name: str, weights: Path | bytes, key: str | None = None) -> httpx.Response:
    """Load the demo's json adapter, or other weights of its form, as tensors."""
    data = weights if isinstance(weights, bytes) else (weights / "adapter_model.safetensors").read_bytes()
    config = json.loads((Path(PATHS["json"]) / "adapter_config.json").read_text())
    body = {"lora_name": name, "config_dict": config, "serialized_tensors": base64.b64encode(data).decode()}
    return ask(target, "POST", "/load_lora_adapter_from_tensors", body, key)


@contextlib.contextmanager
def silent_host() -> Iterator[str]:
    """One that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@processes(6, "a hub that never answers")
def silent_hub(record: Record) -> None:
    with silent_host() as url:
        env = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}
        flags = ("--max-loaded-loras", "2", "--enable-lora", "--lora-load-timeout", "60")
        with own_server(record.log, "--device", "cpu", *flags, *record.servers, env=env) as target:
            for name in ("pirate", "sql", "json"):
                record.expect(f"load {name}", load(target, name).status_code, 200)
            for i in range(20):
                threading.Thread(target=load, args=(target, f"x{i}", f"org/x{i}")).start()
            time.sleep(3)
            start = time.monotonic()
            record.expect("load a directory beside 20 hanging loads", load(target, "french").status_code, 200)
            evicted = [generate(target, lora_path=name).status_code for name in ("pirate", "sql", "json", "french")]
            record.count("/generate with each of 4, of which 2 are in host memory", evicted, 200)
            took = time.monotonic() - start
            record.note("these 5 together", f"{took:.1f} s", took < 10)
            stopped(target, record, "SIGTERM", 10)


def stopped(target: Target, record: Record, name: str, seconds: float, signals: int = 1) -> None:
    """Note how long a server takes to end."""
    process = psutil.Process(target.pid)
    start = time.monotonic()
    for _ in range(signals):
        process.terminate()
        time.sleep(0.5)
    gone, _ = psutil.wait_procs([process], 90)
    took = time.monotonic() - start
    record.note(f"{name}: the process is gone after", f"{took:.1f} s", bool(gone) and took < seconds)


@requests(10, "a stalled reader and its adapter's unload")
def stalled_unload(target: Target, record: Record) -> None:
    load(target, "pirate")
    body = {"text": PROMPT, "stream": True, "lora_path": "pirate", "sampling_params": FLOOD, "return_logprob": True}
    with target.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.sendall(head("/generate", json.dumps(body | {"top_logprobs_num": 20}).encode()))
        record.note("one that reads nothing has begun", until(lambda: _load(target) == 1, 30) is not None, True)
        start = time.monotonic()
        status = unload(target, "pirate").status_code
        took = time.monotonic() - start
        record.note("unload behind it", f"{status} after {took:.1f} s", status == 200 and took < 120)
        again = load(target, "pirate").status_code
        record.expect("the name can be loaded again", again, 200)
    idle(target, record)


def _load(target: Target) -> int:
    return int(ask(target, "GET", "/load").json()["server_load"])


@processes(11, "faults of the server in loads")
def server_faults(record: Record) -> None:
    folder = Path(tempfile.mkdtemp(prefix="points-"))
    try:
        copies = {name: shutil.copytree(PATHS[name], folder / name) for name in ("pirate", "sql", "json")}
        flags = ("--max-loaded-loras", "1", "--enable-lora", *record.servers)
        with own_server(record.log, "--device", "cpu", *flags) as target:
            _evicted(target, record, copies)
            _dead_loader(target, record)
            _full_disk(target, record)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _evicted(target: Target, record: Record, copies: dict[str, Path]) -> None:
    for name, path in copies.items():
        record.expect(f"load {name}", load(target, name, str(path)).status_code, 200)
    for path in copies["pirate"].iterdir():
        os.utime(path)
    record.expect(
        "an evicted adapter whose files were touched", generate(target, lora_path="pirate").status_code, 200
    )
    generate(target, lora_path="json")
    shutil.rmtree(copies["sql"])
    for _ in range(2):
        answer = generate(target, lora_path="sql")
        got = f"{said(answer, 'AdapterUnavailable')}, Retry-After {'retry-after' in answer.headers}"
        record.expect("an evicted adapter whose files are gone", got, "503, Retry-After True")
    shutil.copytree(PATHS["sql"], copies["sql"])
    record.expect("its files are there again", generate(target, lora_path="sql").status_code, 200)


def _dead_loader(target: Target, record: Record) -> None:
    def loaders() -> list[psutil.Process]:
        family = psutil.Process(target.pid).children(recursive=True)
        found = []
        for one in family:
            with contextlib.suppress(psutil.Error):
                if any(LOADER in word for word in one.cmdline()):
                    found.append(one)
        return found

    first = loaders()
    record.note("loader's processes", len(first), bool(first))
    for one in first:
        one.kill()
    statuses = [load(target, f"a{i}", PATHS["json"]).status_code for i in range(4)]
    record.count("4 loads after the loader was killed", statuses, 200)
    over = threading.Event()

    def kill_all() -> None:
        while not over.wait(0.02):
            for one in loaders():
                with contextlib.suppress(psutil.Error):
                    one.kill()

    thread = threading.Thread(target=kill_all)
    thread.start()
    answer = load(target, "never", PATHS["french"], timeout=90)
    over.set()
    thread.join()
    got = f"{answer.status_code}, Retry-After {'retry-after' in answer.headers}"
    record.expect("a load while each loader is killed", got, "503, Retry-After True")
    took = until(lambda: load(target, "french").status_code == 200, 70)
    record.note("loads are back after", f"{took and round(took, 1)} s", took is not None)


def _full_disk(target: Target, record: Record) -> None:
    """Files of the front's may not grow: what EFBIG is to a write, ENOSPC is, too."""
    process = psutil.Process(target.pid)
    before = process.rlimit(resource.RLIMIT_FSIZE)
    process.rlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    answer = from_tensors(target, "t", Path(PATHS["json"]))
    process.rlimit(resource.RLIMIT_FSIZE, before)
    record.expect("tensors that the disk does not take", said(answer, "could not be kept"), "507")
    record.expect("tensors once it does", from_tensors(target, "t", Path(PATHS["json"])).status_code, 200)
    record.expect("/generate with them", generate(target, lora_path="t").status_code, 200)


@requests(11, "an adapter larger than its memory", TIGHT)
def no_memory(target: Target, record: Record) -> None:
    record.expect("load with --lora-host-bytes 1000", load(target, "json").status_code, 400, 503, 507)
    record.expect("the base model", generate(target).status_code, 200)


@requests(14, "weights that are no numbers")
def hostile_weights(target: Target, record: Record) -> None:
    from safetensors.torch import load as read
    from safetensors.torch import save

    data = (Path(PATHS["json"]) / "adapter_model.safetensors").read_bytes()
    for value in (float("inf"), float("nan")):
        answer = from_tensors(target, "bad", save(_filled(read(data), value)))
        record.expect(f"weights of {value}", said(answer, "finite"), "400")
    for value in (1e6, 3e38):  # numbers, whose sums may be none
        loaded = from_tensors(target, "large", save(_filled(read(data), value)))
        record.expect(f"weights of {value}", loaded.status_code, 200)
        record.expect("/generate with it", generate(target, lora_path="large").status_code, 200, 400)
        record.expect("/generate without it", generate(target).status_code, 200)
        record.expect("unload", unload(target, "large").status_code, 200)


def _filled(tensors: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, value, dtype=torch.float32) for name, tensor in tensors.items()}


@requests(18, "metric labels after replace and unload")
def labels(target: Target, record: Record) -> None:
    load(target, "pirate")
    thread = threading.Thread(target=generate, args=(target, LONG), kwargs={"lora_path": "pirate"})
    thread.start()
    until(lambda: _load(target) == 1, 30)
    record.expect(
        "replace while the old version runs", load(target, "pirate", PATHS["sql"], upsert=True).status_code, 200
    )
    record.expect("/generate with the new one", generate(target, lora_path="pirate").status_code, 200)
    record.expect("unload", unload(target, "pirate").status_code, 200)
    thread.join()
    until(lambda: _load(target) == 0, 30)
    lines = [line for line in ask(target, "GET", "/metrics").text.splitlines() if '"pirate"' in line]
    record.expect("series that still name it", len(lines), 0)
