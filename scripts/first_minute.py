"""A stranger's first minutes with a built wheel: an environment, pip, `multilora demo`, an adapter, openai.

Makes an environment in a temporary directory, installs the wheel there (and the openai client, as a user would), and
runs each step outside of the repository. Prints what each took. Exit code 1, with the output, at the first that
fails.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 600
CLIENT = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
for model in ("multilora-demo", "mine"):
    message = {"role": "user", "content": "What is the capital of France?"}
    chat = client.chat.completions.create(model=model, messages=[message], temperature=0)
    print(f"{model}: {chat.choices[0].message.content}")
"""


def main() -> int:
    """Run every step. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the wheel, as `make dist` builds it")
    wheel = parser.parse_args().wheel.resolve()
    with tempfile.TemporaryDirectory() as folder:
        try:
            _walk(wheel, Path(folder))
        except subprocess.CalledProcessError as e:
            sys.stderr.write(f"FAILED: {' '.join(map(str, e.cmd))}\n{(e.stdout or b'').decode()[-4000:]}\n")
            return 1
    return 0


def _walk(wheel: Path, folder: Path) -> None:
    python = folder / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    _step("environment", [sys.executable, "-m", "venv", folder / "env"], folder)
    _step("pip install torch", [*pip, "torch"], folder)  # alone, so that nothing pulls another build
    _step("pip install multilora", [*pip, wheel], folder)
    _step("multilora demo", [python.parent / "multilora", "demo"], folder)
    _step("pip install openai", [*pip, "openai"], folder)
    find = "from multilora.demo import adapter_paths; print(adapter_paths()['pirate'])"
    adapter = _step("an adapter", [python, "-c", find], folder).strip()
    with _server([python.parent / "multilora", "serve", "--lora-paths", f"mine={adapter}"], folder) as url:
        said = _step("openai client", [python, "-c", CLIENT, url], folder)
    sys.stdout.write(said)
    if "mine: Arr, the capital o' France be Paris, matey!" not in said:
        raise subprocess.CalledProcessError(1, ["the adapter's answer"], said.encode())


def _step(name: str, command: list[object], folder: Path) -> str:
    """Run a command outside of the repository, and print how long it took. Returns its output."""
    began = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    sys.stdout.write(f"{name:24} {time.monotonic() - began:6.1f} s\n")
    sys.stdout.flush()
    return done.stdout.decode()


@contextlib.contextmanager
def _server(command: list[object], folder: Path) -> Iterator[str]:
    """The URL of a server, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began, url = time.monotonic(), f"http://127.0.0.1:{port}"
    command = [*map(str, command), "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > began + START_SECONDS:
                raise subprocess.CalledProcessError(1, command, (folder / "log").read_bytes())
            time.sleep(0.1)
        sys.stdout.write(f"{'multilora serve':24} {time.monotonic() - began:6.1f} s\n")
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/health", timeout=5).status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
