"""Adapters from the Hugging Face hub, `org/name[@revision]`, through huggingface_hub and its cache.

It owns the form of such a path, which files are fetched, and the meaning of the hub's errors. HF_ENDPOINT, HF_TOKEN,
HF_HOME and HF_HUB_OFFLINE work as everywhere else. Called by `sources/__init__.py` and `download.py`.
"""

import errno
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multilora.adapters.sources.files import CONFIG_NAME, INDEX_NAME, show
from multilora.errors import AdapterError, AdapterInvalid, AdapterNotFound, AdapterUnavailable, StorageFailed

logger = logging.getLogger(__name__)

HUB_SCHEME = "hf://"  # may stand before the name

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[A-Za-z0-9][\w./+-]*))?", re.ASCII
)
FILES = [CONFIG_NAME, INDEX_NAME, "adapter_model*.safetensors"]  # of the top directory: "*" stays in one name below


def is_hub_id(path: str) -> bool:
    """Whether the path has the form org/name[@revision]."""
    return HUB_ID.fullmatch(path) is not None and ".." not in path


class HubSource:
    """The hub at `endpoint` (None: HF_ENDPOINT, or the public one), cached in `cache_dir` (None: HF_HUB_CACHE).

    extra: names of files beside an adapter's own, fetched where a repository has them. local_dir: where the files go
    instead of the cache.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        cache_dir: Path | None = None,
        extra: Sequence[str] = (),
        local_dir: Path | None = None,
    ):
        self._endpoint = endpoint
        self._cache_dir = cache_dir
        self._patterns = [*FILES, *extra]
        self._local_dir = local_dir

    def fetch(self, path: str) -> Path:
        """The cached snapshot of `org/name[@revision]`.

        Raises AdapterNotFound (no such repository, revision or file; offline and not cached), AdapterUnavailable (hub
        not reachable and not cached), StorageFailed (disk full), AdapterError (gated), AdapterInvalid for a path of
        another form.
        """
        found = HUB_ID.fullmatch(path)
        if found is None or not is_hub_id(path):
            raise AdapterInvalid(f"{show(path)}: a hub repository is written org/name or org/name@revision")
        start = time.monotonic()
        snapshot = self._download(found["repo"], found["revision"])
        if not (snapshot / CONFIG_NAME).exists():
            raise AdapterNotFound(f"hub repository {show(path)} has no {CONFIG_NAME}: not a PEFT adapter")
        logger.info("adapter %s: %s after %.2f s", path, snapshot, time.monotonic() - start)
        return snapshot

    def _download(self, repo: str, revision: str | None) -> Path:
        from huggingface_hub import snapshot_download
        from tqdm import tqdm

        class Silent(tqdm):  # type: ignore[misc]  # tqdm has no types; bars of several loads would garble the log
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **{**kwargs, "disable": True})

        try:
            folder = snapshot_download(
                repo,
                revision=revision,
                endpoint=self._endpoint,
                cache_dir=self._cache_dir,
                local_dir=self._local_dir,
                allow_patterns=self._patterns,
                tqdm_class=Silent,
            )
        except Exception as e:  # huggingface_hub's own errors, those of its HTTP library (httpx or httpx2), OSError
            raise _explain(e, repo, revision) from e
        return Path(folder)


def _explain(e: Exception, repo: str, revision: str | None) -> AdapterError:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    where = f"hub repository {show(repo)}"
    match e:
        case hub.GatedRepoError():
            return AdapterError(f"{where} is gated: ask for access and set HF_TOKEN")
        case hub.RevisionNotFoundError():
            return AdapterNotFound(f"{where} has no revision {show(revision)}")
        case hub.RepositoryNotFoundError():
            return AdapterNotFound(f"no {where} (is it private, and HF_TOKEN not set?), and no such directory")
        case hub.HFValidationError():
            return AdapterInvalid(f"{where}: not a valid name: {show(str(e))}")
        case hub.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return AdapterNotFound(f"{where} is not, or not completely, in the hub cache, and HF_HUB_OFFLINE is set")
        case hub.LocalEntryNotFoundError():
            return AdapterUnavailable(f"{where}: the hub cannot be reached: {show(str(e.__cause__ or e))}")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return StorageFailed(f"{where}: the hub's cache cannot be written: {e.strerror}")
    return AdapterError(f"{where}: download failed: {type(e).__name__}: {show(str(e))}")
