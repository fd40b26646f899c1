"""What the host has: folders, limits, compilers."""

import os

from multilora.cli.doctor.host import cache_of, host_facts


def test_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    os.symlink(tmp_path / "a" / "b", tmp_path / "a" / "link")
    found = cache_of("things", tmp_path)
    assert found.exists and found.writable and found.used == 5 and found.free > 0
    later = cache_of("things", tmp_path / "not" / "yet")
    assert not later.exists and later.writable and later.used == 0
    file = cache_of("things", tmp_path / "a" / "b" / "c")
    assert not file.writable


def test_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "/base")
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("")
    found = host_facts()
    assert found.cores >= 1 and found.compiler == "/opt/cc" and found.nvcc == str(tmp_path / "bin" / "nvcc")
    paths = {cache.kept: cache.path for cache in found.caches}
    assert paths["kernels of Triton"] == str(tmp_path)
    assert paths["kernels of FlashInfer"] == "/base/.cache/flashinfer"
    assert len(paths) == 4
