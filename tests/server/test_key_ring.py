"""Which caller a key stands for, and reading the file of keys again."""

import logging

import pytest

from multilora.config import Config
from multilora.errors import ConfigError
from multilora.front.access import NOBODY, OPERATOR
from multilora.server.key_hash import new_salt, write_hash
from multilora.server.key_ring import KeyRing

FIRST, SECOND = "first key of all, long", "second key of all, long"


def text(*keys, tenant="acme"):
    return "".join(
        f'[keys.k{i}]\nhash = "{write_hash(key, new_salt())}"\ntenant = "{tenant}"\n' for i, key in enumerate(keys)
    )


def test_the_keys_of_flags():
    both = KeyRing(Config(api_key="user", admin_api_key="admin"))
    assert both.nobody is None
    assert both.caller("nope") is None
    user, admin = both.caller("user"), both.caller("admin")
    assert (user.admin, user.load, user.any_path) == (False, (), False)
    assert (admin.admin, admin.any_path) == (True, True)
    alone = KeyRing(Config(api_key="user")).caller("user")
    assert (alone.admin, alone.load, alone.any_path) == (True, ("*",), False)


def test_who_sends_no_key():
    assert KeyRing(Config()).nobody is OPERATOR
    assert KeyRing(Config(metrics_key="m")).nobody is OPERATOR
    assert KeyRing(Config(admin_api_key="admin")).nobody is NOBODY


def test_a_file_is_read_again(tmp_path, caplog):
    path = tmp_path / "keys.toml"
    path.write_text(text(FIRST))
    ring = KeyRing(Config(auth_file=str(path)))
    seen = []
    ring.watch(lambda file: seen.append(set(file.tenants)))
    assert ring.caller(FIRST).key_id == "k0"
    assert ring.caller(SECOND) is None
    path.write_text(text(SECOND, tenant="other"))
    with caplog.at_level(logging.INFO):
        ring.reload()
    assert ring.caller(FIRST) is None
    assert ring.caller(SECOND).tenant.name == "other"
    assert seen == [{"acme"}, {"other"}]
    assert "1 keys" in caplog.text
    assert SECOND not in caplog.text


@pytest.mark.parametrize("broken", ["[keys", text(FIRST) + 'loads = ["*"]\n', None])
def test_a_broken_file_changes_nothing_and_the_log_says_why(tmp_path, caplog, broken):
    path = tmp_path / "keys.toml"
    path.write_text(text(FIRST))
    ring = KeyRing(Config(auth_file=str(path)))
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    ring.reload()
    assert ring.caller(FIRST).key_id == "k0"
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "the keys are not changed" in record.message
    assert "blake2b" not in record.message


def test_a_tenant_is_not_called_like_the_base_model(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(text(FIRST))
    with pytest.raises(ConfigError, match="called like the base model"):
        KeyRing(Config(auth_file=str(path), served_model_name="acme"))


def test_a_file_and_an_api_key_do_not_go_together():
    with pytest.raises(ConfigError, match="only one of them"):
        Config(auth_file="keys.toml", api_key="k")


def test_finding_a_key_takes_as_long_whoever_has_it(tmp_path, monkeypatch):
    """Each known key is compared, in constant time, whichever is the right one and whether there is one."""
    keys = [f"{FIRST} {i}" for i in range(5)]
    path = tmp_path / "keys.toml"
    path.write_text(text(*keys))
    compared = []

    def compare(a, b):
        compared.append((a, b))
        return a == b

    rings = (
        (KeyRing(Config(auth_file=str(path), admin_api_key="admin", metrics_key="m")), len(keys) + 1),
        (
            KeyRing(Config(api_key="user", admin_api_key="admin")),
            2,
        ),
    )
    monkeypatch.setattr("hmac.compare_digest", compare)
    for ring, number in rings:
        for key in (*keys, "admin", "user", "", "nobody's"):
            compared.clear()
            ring.caller(key)
            assert len(compared) == number
    scraping = rings[0][0]
    for key in ("m", "admin", "nobody's"):
        compared.clear()
        scraping.may_scrape_all(key)
        assert len(compared) == 2
