"""Keys from files and the environment."""

from pathlib import Path

import pytest

from multilora.cli.parser import ServeArgs, parse
from multilora.config import Config
from multilora.errors import ConfigError


def config_of(*argv: str) -> Config:
    arguments = parse(["serve", *argv])
    assert isinstance(arguments, ServeArgs)
    return arguments.config()


def test_keys_from_files(tmp_path: Path):
    for name in ("user", "admin"):
        (tmp_path / name).write_text(f"{name} key\n")
    config = config_of("--api-key-file", f"{tmp_path}/user", "--admin-api-key-file", f"{tmp_path}/admin")
    assert (config.api_key, config.admin_api_key) == ("user key", "admin key")


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    assert config_of().api_key is None
    monkeypatch.setenv("MULTILORA_API_KEY", "user")
    monkeypatch.setenv("MULTILORA_ADMIN_API_KEY", "admin")
    config = config_of()
    assert (config.api_key, config.admin_api_key) == ("user", "admin")
    assert config_of("--api-key", "flag").api_key == "flag"


@pytest.mark.parametrize("key", ["", " ", "schlüssel", "a\nb"])
@pytest.mark.parametrize("flag", ["--api-key", "--admin-api-key"])
def test_a_key_that_nobody_can_send_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str, key: str):
    """`--api-key ""`, from an unset shell variable, started an open server."""
    with pytest.raises(ConfigError, match=f"{flag} is empty or"):
        config_of(flag, key)
    monkeypatch.setenv("MULTILORA" + flag[1:].upper().replace("-", "_"), key)
    with pytest.raises(ConfigError, match=f"{flag} is empty or"):
        config_of()


def test_mistakes_with_files(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--api-key-file .*: No such file"):
        config_of("--api-key-file", f"{tmp_path}/none")
    (tmp_path / "key").write_text("")
    with pytest.raises(ConfigError, match="--api-key is empty"):
        config_of("--api-key-file", f"{tmp_path}/key")
    (tmp_path / "key").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="it is not text"):
        config_of("--api-key-file", f"{tmp_path}/key")
    with pytest.raises(ConfigError, match="only one of them"):
        config_of("--api-key", "a", "--api-key-file", f"{tmp_path}/key")
