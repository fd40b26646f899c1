"""What `deploy/` tells other programs to start: flags that the command line knows, paths and times that fit."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from multilora.cli import parser as cli
from multilora.config import Config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile*"))


def serves(words: list[str]) -> Config:
    """The configuration that a command line of `multilora serve` makes."""
    name = words.index("serve")
    assert Path(words[name - 1]).name == "multilora"
    args = cli.parse(words[name:])
    assert isinstance(args, cli.ServeArgs) and not args.ignored
    return args.config()


def instructions(path: Path) -> dict[str, list[str]]:
    """Dockerfile instruction → its arguments, in order; continued lines joined, comments left out."""
    text = re.sub(r"\\\n", " ", "\n".join(x for x in path.read_text().splitlines() if not x.startswith("#")))
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest.strip())
    return found


def entry(path: Path, command: list[str] | None = None) -> list[str]:
    found = instructions(path)
    start: list[str] = json.loads(found["ENTRYPOINT"][-1])
    return start + (json.loads(found["CMD"][-1]) if command is None else command)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_starts_a_server_that_is_nobody_special(path: Path) -> None:
    found = instructions(path)
    config = serves(entry(path))
    assert config.host == "0.0.0.0" and config.state_dir == "/state"
    assert found["EXPOSE"] == [str(config.port)] and f"localhost:{config.port}/health" in found["HEALTHCHECK"][0]
    assert found["USER"] == ["10001"] and found["STOPSIGNAL"] == ["SIGTERM"]
    assert not any("latest" in image or ":" not in image.split()[0] for image in found["FROM"])
    for copied in found["COPY"]:
        *sources, _ = [word for word in copied.split() if not word.startswith("--")]
        assert "--from=build" in copied or all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    options = ["--ignore", "DL3042", "--ignore", "DL3013"]  # pip's cache is off, and the wheel brings the versions
    done = subprocess.run(["hadolint", *options, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    return found


def test_compose_starts_the_server_beside_what_watches_it() -> None:
    services = compose()["services"]
    assert set(services) == {"multilora", "prometheus", "grafana"}
    config = serves(entry(DOCKERFILES[0], services["multilora"]["command"]))
    assert f"{config.port}:{config.port}" in services["multilora"]["ports"]
    grace = int(services["multilora"]["stop_grace_period"].removesuffix("s"))
    assert grace > config.drain_seconds
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == [f"localhost:{config.port}"]
    assert services["prometheus"]["network_mode"] == "service:multilora"


def test_what_compose_mounts_is_there() -> None:
    found = compose()
    for service in found["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / "docker" / source).resolve().exists(), source
            else:
                assert source in found["volumes"]


def test_grafana_finds_its_source_and_its_board() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    board = json.loads((DEPLOY / "grafana" / "multilora.json").read_text())
    assert board["templating"]["list"][0]["query"] == source["type"] == "prometheus"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "multilora.yaml").read_text())["providers"]
    mounts = compose()["services"]["grafana"]["volumes"]
    assert any(mount.split(":")[1] == f"{provider['options']['path']}/multilora.json" for mount in mounts)


def test_systemd_starts_a_server_and_waits_for_its_drain() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "systemd" / "multilora.service")
    service = unit["Service"]
    words = shlex.split(service["ExecStart"].replace("%S", "/var/lib"))
    assert words[-1] == "$MULTILORA_FLAGS"
    config = serves(words[:-1])
    assert int(service["TimeoutStopSec"]) > config.drain_seconds
    assert service["ExecReload"].endswith("-HUP $MAINPID") and service["Restart"] == "on-failure"
