"""Runs `multilora keys …`: keys out on stdout, hashes into a file, exit code out. Called by `__main__.py`."""

import json
import os
import sys
import tempfile
from pathlib import Path

from multilora.cli.keys_args import KeyArgs
from multilora.errors import ConfigError
from multilora.server.key_file import parse_key_file, read_key_file
from multilora.server.key_hash import new_key, new_salt, write_hash


def run(args: KeyArgs) -> int:
    """Run one command and return its exit code. Raises ConfigError."""
    if args.command == "hash":
        key = sys.stdin.readline().rstrip("\n")
        sys.stdout.write(write_hash(key, _salt(args.file)) + "\n")
        return 0
    assert args.file is not None
    key = new_key()
    path = Path(args.file)
    before = _read(path)
    text = before + ("\n" if before else "") + _table(args, write_hash(key, _salt(args.file if before else None)))
    parse_key_file(text)
    _write(path, text)
    sys.stdout.write(key + "\n")
    return 0


def _salt(path: str | None) -> bytes:
    """That of the file's first key, so that the server hashes only once; else a new one."""
    return new_salt() if path is None else next(iter(read_key_file(path).salts))


def _table(args: KeyArgs, hashed: str) -> str:
    fields = {name: getattr(args, name) for name in ("tenant", "admin", "pin", "use", "see", "load")}
    fields |= {name: getattr(args, name) for name in ("requests_per_minute", "tokens_per_minute", "concurrency")}
    lines = [f"[keys.{json.dumps(args.key_id)}]", f'hash = "{hashed}"']
    for name, value in fields.items():
        if value is not None and value is not False:
            lines.append(f"{name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return "\n".join(lines) + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from None


def _write(path: Path, text: str) -> None:
    """In one piece: a server that reads meanwhile sees the old file or the new one. Others cannot read a new file."""
    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=".keys-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, mode)
            os.replace(name, path.resolve())
        except BaseException:
            os.unlink(name)
            raise
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written: {e.strerror}") from None
