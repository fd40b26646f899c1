"""Rules of options that are more than a type and bounds: addresses, keys, pairs of numbers. `config.py` says which of
them hold for which option.

Every function raises ConfigError, which names the flag and the value.
"""

import re
from collections.abc import Sequence

from multilora.errors import ConfigError


def check_origins(origins: Sequence[str]) -> None:
    """Web pages that may call the server: `*`, or scheme and host."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise ConfigError(f"--cors-origins: {origin!r}: expected * or an origin as https://example.org")


def check_key(name: str, key: str | None) -> None:
    """Whether an HTTP header can carry the key; name: of the option."""
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag} is empty or has characters that no HTTP header can carry")


def check_traces_endpoint(url: str | None) -> None:
    """Whether traces can be sent there."""
    if url is not None and not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", url):
        raise ConfigError(f"--otlp-traces-endpoint: {url!r}: expected http(s)://HOST:PORT, of OTLP over HTTP")


def check_resolver(urls: Sequence[str], hub_patterns: Sequence[str]) -> None:
    """Where adapters of unknown names are looked for."""
    for url in urls:
        if not re.fullmatch(r"(https?|s3|gs)://[^/?#\s]+(/[^?#\s]*)?", url) or "::" in url:
            raise ConfigError(f"--lora-resolver-url: {url!r}: expected http(s)://, s3:// or gs:// and a place")
    for pattern in hub_patterns:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.*?-]+", pattern, re.ASCII):
            raise ConfigError(f"--lora-resolver-hub: {pattern!r}: expected ORG/* or ORG/PATTERN")


def check_match_windows(smallest: int, largest: int) -> None:
    """The smallest and the largest match that n-gram drafts look for."""
    if smallest > largest:
        raise ConfigError(
            f"--speculative-ngram-min-match-window-size ({smallest}) must be at most "
            f"--speculative-ngram-max-match-window-size ({largest})"
        )


def check_targets(targets: Sequence[str] | None) -> None:
    """Modules that adapters may act on. Whether the model has them is checked by `engine/build_rank.py`."""
    if targets is None:
        return
    if not targets:
        raise ConfigError("--lora-target-modules: no module given")
    if "all" in targets and len(targets) > 1:
        raise ConfigError("--lora-target-modules: 'all' stands alone")
