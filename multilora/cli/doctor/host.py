"""What the host has for a server: cores, memory, shared memory, descriptors, compilers, and folders for caches.

Called by `command.py`.
"""

import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from multilora.adapters.host.spare_memory import spare_memory
from multilora.adapters.sources.shared_memory import ROOT as SHARED_MEMORY
from multilora.models.gguf import cache_folder


@dataclass(frozen=True)
class CacheFolder:
    """One folder that a server keeps things in. kept: what; used: bytes in it; free: bytes left on its disk."""

    kept: str
    path: str
    exists: bool
    writable: bool
    used: int
    free: int


@dataclass(frozen=True)
class HostFacts:
    """cores: those that this process may use; spare, shared_free: bytes, None if the system does not say;
    descriptors: the most that a server can have; compiler, nvcc: paths of what Triton and FlashInfer compile with."""

    cores: int
    threads: str | None  # OMP_NUM_THREADS
    spare: int | None
    shared_total: int | None
    shared_free: int | None
    descriptors: int | None
    compiler: str | None
    nvcc: str | None
    caches: list[CacheFolder]


def host_facts() -> HostFacts:
    """Look at this machine. Changes nothing."""
    total, free = _disk(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else (None, None)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return HostFacts(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=os.environ.get("OMP_NUM_THREADS"),
        spare=spare_memory(),
        shared_total=total,
        shared_free=free,
        descriptors=None if hard == resource.RLIM_INFINITY else hard,
        compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc"),
        nvcc=_nvcc(),
        caches=[cache_of(kept, path) for kept, path in _cache_paths().items()],
    )


def cache_of(kept: str, path: Path) -> CacheFolder:
    """The folder's state; if it does not exist, that of the nearest one above it, where it would be made."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    used = sum(_size(file) for file in path.rglob("*")) if path.is_dir() else 0
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return CacheFolder(kept, str(path), path.exists(), writable, used, _disk(there)[1])


def _cache_paths() -> dict[str, Path]:
    from huggingface_hub.constants import HF_HUB_CACHE

    home = Path.home()
    triton = os.environ.get("TRITON_CACHE_DIR")
    flashinfer = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", home))
    return {
        "models and adapters of the hub": Path(HF_HUB_CACHE),
        "converted GGUF files": cache_folder(),
        "kernels of Triton": Path(triton) if triton else Path(os.environ.get("TRITON_HOME", home)) / ".triton/cache",
        "kernels of FlashInfer": flashinfer / ".cache/flashinfer",
    }


def _nvcc() -> str | None:
    """NVIDIA's compiler, where FlashInfer looks for it."""
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root and (found := Path(root) / "bin/nvcc").exists():
            return str(found)
    return shutil.which("nvcc")


def _size(file: Path) -> int:
    try:
        return 0 if file.is_symlink() or not file.is_file() else file.stat().st_size
    except OSError:  # it has gone meanwhile, or may not be seen
        return 0


def _disk(path: Path) -> tuple[int, int]:
    usage = shutil.disk_usage(path)
    return usage.total, usage.free
