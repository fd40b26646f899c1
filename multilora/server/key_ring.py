"""Which caller a key stands for: the keys of the flags, and those of --auth-file, which are read again on demand.

Knows neither routes nor HTTP. Called by `auth.py`, `app.py` and `serve.py`.
"""

import hmac
import logging
from collections.abc import Callable

from multilora.config import Config
from multilora.errors import ConfigError
from multilora.front.access import NOBODY, OPERATOR, Caller
from multilora.server.key_file import KeyFile, read_key_file

logger = logging.getLogger(__name__)


class KeyRing:
    """All keys of one server. Raises ConfigError if --auth-file cannot be read.

    nobody: who has sent no key, None: such a request is refused.
    """

    def __init__(self, config: Config):
        self._path = config.auth_file
        self._model_name = config.model_name
        self._flags: list[tuple[bytes, Caller]] = []
        self._scrapers: list[bytes] = []
        self._watchers: list[Callable[[KeyFile], None]] = []
        for key, caller in (
            (config.admin_api_key, Caller(key_id="admin-api-key", admin=True, load=("*",), pin=True, any_path=True)),
            (config.api_key, _of_api_key(config)),
        ):
            if key is not None:
                self._flags.append((key.encode(), caller))
        for key in (config.metrics_key, config.admin_api_key):
            if key is not None:
                self._scrapers.append(key.encode())
        self.scrape_is_open = config.metrics_key is None and config.auth_file is None
        self.nobody = _nobody(config)
        self._file = None if self._path is None else self._read(self._path)

    @property
    def tenants(self) -> bool:
        """Whether keys are those of tenants, so that what they may do is their own affair."""
        return self._path is not None

    def caller(self, key: str) -> Caller | None:
        """Who sends this key; None: nobody has it."""
        given = key.encode(errors="replace")
        found = [caller for known, caller in self._flags if hmac.compare_digest(known, given)]
        if self._file is not None and (of_file := self._file.caller(key)) is not None:
            found.append(of_file)
        return found[0] if found else None

    def may_scrape_all(self, key: str) -> bool:
        """Whether the key is that of --metrics-key, or the one of --admin-api-key."""
        given = key.encode(errors="replace")
        matches = [hmac.compare_digest(known, given) for known in self._scrapers]
        return any(matches)

    def watch(self, changed: Callable[[KeyFile], None]) -> None:
        """Call `changed` with what is in --auth-file, now and whenever that is read again."""
        self._watchers.append(changed)
        if self._file is not None:
            changed(self._file)

    def reload(self) -> None:
        """Read --auth-file again. If that fails the keys stay as they are, and the log says why."""
        if self._path is None:
            return
        try:
            self._file = self._read(self._path)
        except ConfigError as e:
            logger.error("the keys are not changed: %s", e)
            return
        for changed in self._watchers:
            changed(self._file)
        logger.info("--auth-file read again: %d keys", sum(map(len, self._file.salts.values())))

    def _read(self, path: str) -> KeyFile:
        found = read_key_file(path)
        if self._model_name in found.tenants:
            raise ConfigError(f"--auth-file {path}: tenant {self._model_name!r} is called like the base model")
        return found


def _of_api_key(config: Config) -> Caller:
    """The only key may do everything, but read no directory that the operator has not named."""
    alone = config.admin_api_key is None
    return Caller(key_id="api-key", admin=alone, load=("*",) if alone else (), pin=alone)


def _nobody(config: Config) -> Caller | None:
    if config.api_key is not None or config.auth_file is not None:
        return None
    return OPERATOR if config.admin_api_key is None else NOBODY
