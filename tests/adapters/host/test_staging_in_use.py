"""Staging memory under a loader with packing processes: many adapters at once, good and bad ones, that are finished,
moved out, copied and dropped in any order, while the loader is killed now and then. No byte is ever another
adapter's, and no part of the memory is lost."""

import gc
import random
import select
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.tiers import BASE, PAGE_BYTES, TARGET, write_adapter
from safetensors.torch import load_file, save_file

from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.host.mapping import HostEntry
from multilora.adapters.host.staging import Staging
from multilora.adapters.loading.loader import FetchContext, FetchJob, allocate_private, fetch
from multilora.adapters.loading.process import ProcessLoader

CONTEXT = FetchContext(BASE, TARGET, AdapterLimits())
STAGING = 64 * PAGE_BYTES
ADAPTERS = 600
AT_ONCE = 30

SERVE_ON_MANY_CORES = """
from multilora.adapters.loading import process
process.spare_cores = lambda at_most: 3
process.main()
"""


def adapters(folder: Path) -> list[tuple[str, torch.Tensor | None]]:
    """Paths, and what packing them gives."""
    good = [write_adapter(folder / str(i), rank=rank, seed=i) for i, rank in enumerate((30, 20, 8, 60, 44))]
    infinite = Path(write_adapter(folder / "infinite", rank=30)) / "adapter_model.safetensors"
    tensors = load_file(infinite)
    tensors[max(tensors)][-1, -1] = torch.inf
    save_file(tensors, infinite)
    cut = Path(write_adapter(folder / "cut", rank=30)) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-500])
    bad = [str(infinite.parent), str(cut.parent), str(folder / "missing")]
    return [(path, fetch(FetchJob(0, path), CONTEXT, allocate_private)[1]) for path in good + bad]


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Any:
    start = subprocess.Popen

    def popen(command: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        return start([command[0], "-c", SERVE_ON_MANY_CORES, command[-1]], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", popen)
    made = ProcessLoader(CONTEXT, Staging(STAGING))
    yield made
    made.close()


def poll(loader: ProcessLoader) -> list[Any]:
    select.select([loader.fileno()], [], [], 1)
    return loader.poll()


def is_staged(staging: Staging, pages: torch.Tensor) -> bool:
    return 0 <= pages.data_ptr() - staging._address < STAGING


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [(), (100, 250, 400)])
def test_in_any_order(loader: ProcessLoader, tmp_path: Path, deaths: tuple[int, ...]) -> None:
    """deaths: after how many loads the loader is killed."""
    rng, known, staging = random.Random(0), adapters(tmp_path), loader._staging
    assert staging is not None
    waiting: dict[int, torch.Tensor | None] = {}
    entries: list[tuple[HostEntry, torch.Tensor]] = []
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers that a device still reads
    version = staged = lost = 0
    while version < ADAPTERS or waiting:
        while len(waiting) < AT_ONCE and version < ADAPTERS:
            version += 1
            path, waiting[version] = rng.choice(known)
            loader.submit(FetchJob(version, path))
            if version in deaths:
                loader._child.process.kill()
        for result, pages in poll(loader):
            expected = waiting.pop(result.version)  # each is answered once
            if "the loader process ended with signal 9" in result.message:
                lost += 1
                continue
            if pages is None or expected is None:
                assert pages is expected is None, result
                continue
            assert torch.equal(pages, expected)
            staged += is_staged(staging, pages)
            if rng.random() < 0.3:  # as what DoRA needs is written at last
                pages[..., -16:] = 77
                expected = pages.clone()
            entries.append((HostEntry(TARGET.layout(result.shape), pages), expected))
            if rng.random() < 0.8:
                staging.settle(entries[-1][0])
            if rng.random() < 0.3:
                copies.append((entries[-1][0].buffer, expected))
        assert all(torch.equal(entry.buffer, expected) for entry, expected in entries)
        assert all(torch.equal(buffer, expected) for buffer, expected in copies)
        rng.shuffle(entries)
        rng.shuffle(copies)
        del entries[rng.randrange(12) :], copies[rng.randrange(4) :]
    assert staged > ADAPTERS // 10
    assert lost <= AT_ONCE * len(deaths)
    assert not lost or deaths
    del pages
    entries.clear()
    copies.clear()
    gc.collect()
    all_of_it_is_free(loader, staging, *known[2])


def all_of_it_is_free(loader: ProcessLoader, staging: Staging, path: str, expected: torch.Tensor | None) -> None:
    """As soon as the loader has heard and zeroed it, as many fit as ever could."""
    assert expected is not None and expected.nbytes <= 4096
    end = time.monotonic() + 20
    while True:
        for version in range(STAGING // 4096):
            loader.submit(FetchJob(version, path))
        held: list[torch.Tensor] = []
        while len(held) < STAGING // 4096:
            held += [pages for _, pages in poll(loader)]
        assert all(torch.equal(pages, expected) for pages in held)
        if all(is_staged(staging, pages) for pages in held):
            return
        assert time.monotonic() < end, "a part of it is lost"
        del held
