"""The file of keys: what it may say, and that nothing wrong in it is overlooked. Covers `key_hash.py` too."""

import pytest

from multilora.errors import ConfigError
from multilora.front.access import Caller, Limits, Tenant
from multilora.server.key_file import parse_key_file, read_key_file
from multilora.server.key_hash import MIN_LENGTH, new_key, new_salt, read_hash, write_hash

SALT = bytes(range(16))
KEYS = {name: f"ml-{name}-0123456789abcdef" for name in ("web", "batch", "ops")}
HASHES = {name: write_hash(key, SALT) for name, key in KEYS.items()}
TEXT = f"""
[tenants.acme]
max_adapters = 3
spool_bytes = "1MiB"
roots = ["/srv/acme"]

[keys.web]
hash = "{HASHES["web"]}"
tenant = "acme"
use = ["sql-*", "chat"]
requests_per_minute = 60

[keys.batch]
hash = "{HASHES["batch"]}"
tenant = "other"
load = ["*"]
see = []
pin = true
concurrency = 4
tokens_per_minute = 1000

[keys.ops]
hash = "{HASHES["ops"]}"
admin = true

[adapters."sql-*"]
concurrency = 2
[adapters."*"]
requests_per_minute = 5
"""


def test_what_a_file_says():
    file = parse_key_file(TEXT)
    acme = Tenant("acme", max_adapters=3, spool_bytes=1 << 20, roots=("/srv/acme",))
    assert file.caller(KEYS["web"]) == Caller(
        key_id="web", tenant=acme, use=("sql-*", "chat"), limits=Limits(requests_per_minute=60)
    )
    assert file.caller(KEYS["batch"]) == Caller(
        key_id="batch",
        tenant=Tenant("other"),
        load=("*",),
        see=(),
        pin=True,
        limits=Limits(concurrency=4, tokens_per_minute=1000),
    )
    ops = file.caller(KEYS["ops"])
    assert ops is not None
    assert (ops.admin, ops.any_path, ops.tenant) == (True, True, Tenant())
    assert set(file.tenants) == {"acme", "other"}
    assert file.adapters == (("sql-*", Limits(concurrency=2)), ("*", Limits(requests_per_minute=5)))


@pytest.mark.parametrize("key", ["", "ml-web", KEYS["web"][:-1], KEYS["web"] + "0", HASHES["web"], "ключ", "\udcff"])
def test_a_key_that_nobody_has(key):
    assert parse_key_file(TEXT).caller(key) is None


def test_keys_of_several_salts():
    text = TEXT + f'[keys.late]\nhash = "{write_hash("another key, quite long", new_salt())}"\ntenant = "acme"\n'
    file = parse_key_file(text)
    assert len(file.salts) == 2
    found = [file.caller(key) for key in (KEYS["web"], "another key, quite long")]
    assert [caller.key_id for caller in found if caller] == ["web", "late"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("", "[", "not valid TOML"),
        ("[keys.web]", "[keyz.web]", "'keyz'"),
        ("[keys.web]", '[keys."a b"]', "keys.a b: a name has"),
        ("[tenants.acme]", '[tenants."a:b"]', "tenants.a:b: a name has"),
        (HASHES["web"], "secret", "keys.web.hash"),
        (HASHES["web"], HASHES["batch"], "keys.batch: the same key as keys.web"),
        (f'hash = "{HASHES["web"]}"', "", "keys.web.hash"),
        ('tenant = "acme"', "", "keys.web.tenant"),
        ('tenant = "acme"', 'tenant = "a:b"', "keys.web.tenant"),
        ("admin = true", "admin = 1", "keys.ops.admin: expected true or false"),
        ("admin = true", 'admin = true\nuse = ["x"]', "keys.ops.use: not for an admin's key"),
        ("pin = true", 'pin = "yes"', "keys.batch.pin"),
        ("see = []", 'see = "x"', "keys.batch.see: expected a list"),
        ("see = []", "see = [3]", "keys.batch.see: expected a list"),
        ("see = []", "sea = []", "keys.batch.sea: unknown"),
        ("requests_per_minute = 60", "requests_per_minute = 0", "keys.web.requests_per_minute: expected a positive"),
        ("requests_per_minute = 60", "requests_per_minute = true", "expected a positive"),
        ("concurrency = 2", 'concurrency = "2"', 'adapters."sql-\\*".concurrency'),
        ("concurrency = 2", "tenant = 2", 'adapters."sql-\\*".tenant: unknown'),
        ('spool_bytes = "1MiB"', 'spool_bytes = "much"', "tenants.acme.spool_bytes"),
        ("max_adapters = 3", "max_adapters = 3\nweight = 1", "tenants.acme.weight: unknown"),
        (TEXT, "", "no keys"),
        (TEXT, "keys = 3", "keys: expected tables"),
    ],
)
def test_what_is_wrong_is_named_and_no_hash_is_shown(before, after, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_key_file(TEXT.replace(before, after, 1) if before else TEXT + after)
    assert "blake2b:" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"--auth-file .*nope: No such file"):
        read_key_file(str(tmp_path / "nope"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"--auth-file .*binary: not UTF-8"):
        read_key_file(str(tmp_path / "binary"))
    (tmp_path / "keys").write_text("keys = 3")
    with pytest.raises(ConfigError, match=r"--auth-file .*keys: keys: expected tables"):
        read_key_file(str(tmp_path / "keys"))


def test_hashes():
    key = new_key()
    assert len(key) > 40
    assert new_key() != key
    assert write_hash(key, SALT) != write_hash(key, new_salt())
    assert read_hash(write_hash(key, SALT))[0] == SALT
    assert key not in write_hash(key, SALT)
    assert read_hash("blake2b:00:00") is None
    for bad in ("", "short", "x" * (MIN_LENGTH - 1), " " * 30, "x" * 30 + "\n", "ü" * 30):
        with pytest.raises(ConfigError, match="a key has at least"):
            write_hash(bad, SALT)
