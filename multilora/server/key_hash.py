"""Keys as a file may hold them: salted hashes, which are quick, as keys are random and long.

A text has the form `blake2b:SALT:DIGEST`, both in hexadecimal digits. Called by `key_file.py` and
`cli/key_commands.py`.
"""

import hashlib
import re
import secrets

from multilora.errors import ConfigError

PREFIX = "ml-"
"""The prefix of keys made here, so that scanners for leaked secrets can know them."""
MIN_LENGTH = 20
"""Characters of a key. A shorter one could be guessed from its hash."""
_FORM = re.compile(r"blake2b:([0-9a-f]{32}):([0-9a-f]{64})")


def new_key() -> str:
    """A random key of 256 bits."""
    return PREFIX + secrets.token_urlsafe(32)


def new_salt() -> bytes:
    """A salt; the keys of one file may share it, which lets the server hash what it is sent only once."""
    return secrets.token_bytes(16)


def digest(key: str, salt: bytes) -> bytes:
    """What stands for the key in a file."""
    return hashlib.blake2b(key.encode(errors="replace"), digest_size=32, salt=salt, person=b"multilora-key").digest()


def write_hash(key: str, salt: bytes) -> str:
    """The text that stands for the key. Raises ConfigError for a key that could be guessed, or not be sent."""
    if len(key) < MIN_LENGTH or not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ConfigError(f"a key has at least {MIN_LENGTH} printable ASCII characters, with no space around them")
    return f"blake2b:{salt.hex()}:{digest(key, salt).hex()}"


def read_hash(text: str) -> tuple[bytes, bytes] | None:
    """Salt and digest of such a text; None: it is none."""
    match = _FORM.fullmatch(text)
    return None if match is None else (bytes.fromhex(match[1]), bytes.fromhex(match[2]))
