"""`multilora keys`: a key is shown once, its hash goes into the file. Covers `keys_args.py` too."""

import io
import stat

import pytest

from multilora.__main__ import main
from multilora.front.access import Limits
from multilora.server.key_file import read_key_file


def add(capsys, *argv):
    assert main(["keys", "add", *argv]) == 0
    return capsys.readouterr().out.strip()


def test_add_makes_a_file_and_adds_to_it(tmp_path, capsys):
    path = tmp_path / "keys.toml"
    ops = add(capsys, str(path), "ops", "--admin")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    path.write_text(path.read_text() + "\n# a comment\n[tenants.acme]\nmax_adapters = 2\n")
    more = ["--use", "sql-*", "chat", "--see", "--load", "sql-*", "--pin", "--concurrency", "3"]
    web = add(capsys, str(path), "acme.web", "--tenant", "acme", *more, "--requests-per-minute", "60")
    file = read_key_file(str(path))
    assert file.caller(ops).admin
    caller = file.caller(web)
    assert (caller.key_id, caller.tenant.max_adapters, caller.pin) == ("acme.web", 2, True)
    assert (caller.use, caller.see, caller.load) == (("sql-*", "chat"), (), ("sql-*",))
    assert caller.limits == Limits(requests_per_minute=60, concurrency=3)
    assert len(file.salts) == 1, "one hash for each request"
    text = path.read_text()
    assert "# a comment" in text
    assert ops not in text
    assert web not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["keys.toml"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x"], "keys.x.tenant"),
        (["x", "--tenant", "a b"], "keys.x.tenant"),
        (["x", "--tenant", "acme", "--admin"], "keys.x.tenant: not for an admin's key"),
        (["x:y", "--tenant", "acme"], "a name has"),
        (["x", "--tenant", "acme", "--concurrency", "0"], "keys.x.concurrency"),
        (["there", "--admin"], "not valid TOML"),
        (["x", "--admim"], "unknown argument '--admim'; see multilora keys add --help"),
    ],
)
def test_what_is_wrong_leaves_the_file_as_it_is(tmp_path, capsys, argv, message):
    path = tmp_path / "keys.toml"
    add(capsys, str(path), "there", "--admin")
    before = path.read_bytes()
    assert main(["keys", "add", str(path), *argv]) == 2
    out = capsys.readouterr()
    assert message in out.err
    assert out.out == ""
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    assert main(["keys", "add", str(tmp_path / "no" / "keys.toml"), "x", "--admin"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_hash_reads_a_key_from_stdin(tmp_path, capsys, monkeypatch):
    key = "a key that was there before"

    def hashed(*argv):
        monkeypatch.setattr("sys.stdin", io.StringIO(key + "\n"))
        assert main(["keys", "hash", *argv]) == 0
        return capsys.readouterr().out.strip()

    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.old]\nhash = "{hashed()}"\nadmin = true\n')
    file = read_key_file(str(path))
    assert file.caller(key).key_id == "old"
    assert hashed(str(path)) in path.read_text(), "the same salt"
    assert hashed() not in path.read_text()
    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    assert main(["keys", "hash"]) == 2
