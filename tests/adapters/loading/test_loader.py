"""Fetching in this process: files in, packed pages and facts out, typed errors as part of the result."""

import pytest
import torch
from fakes.tiers import BASE, PAGE_BYTES, SITE, TARGET, write_adapter
from safetensors.torch import load_file, save_file

from multilora.adapters.adapter import AdapterLimits
from multilora.adapters.loading.loader import FetchContext, FetchJob, InlineLoader, allocate_private, fetch
from multilora.errors import AdapterUnavailable

CONTEXT = FetchContext(BASE, TARGET, AdapterLimits())


def test_fetch_reads_checks_and_packs(tmp_path):
    path = write_adapter(tmp_path / "a", rank=12)
    result, pages = fetch(FetchJob(7, path), CONTEXT, allocate_private)
    assert (result.version, result.kind, result.message) == (7, "", "")
    assert (result.shape.ranks, result.rank, result.target_modules) == (((12,),), 12, ["o_proj"])
    assert pages.shape == (2, PAGE_BYTES) and pages.dtype == torch.uint8
    assert pages.view(torch.float32).count_nonzero() == 2 * 12 * SITE.in_features


def test_the_fingerprint_changes_with_the_files(tmp_path):
    def fingerprint() -> str:
        return fetch(FetchJob(1, path), CONTEXT, allocate_private)[0].fingerprint

    path = write_adapter(tmp_path / "a", seed=0)
    first = fingerprint()
    assert fingerprint() == first
    write_adapter(tmp_path / "a", seed=1)
    assert fingerprint() != first


def test_typed_errors_become_the_result(tmp_path):
    other = write_adapter(tmp_path / "other model", width=32)
    broken = tmp_path / "broken"
    write_adapter(broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not at all")
    for path, kind in (
        (str(tmp_path / "missing"), "AdapterNotFound"),
        (other, "AdapterIncompatible"),
        (str(broken), "AdapterInvalid"),
    ):
        result, pages = fetch(FetchJob(1, path), CONTEXT, allocate_private)
        assert pages is None
        assert result.kind == kind
        assert result.message


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_is_refused(tmp_path, half, value):
    path = write_adapter(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.model.layers.0.self_attn.o_proj.lora_{half}.weight"][-1, -1] = value
    save_file(tensors, file)
    result, pages = fetch(FetchJob(1, path), CONTEXT, allocate_private)
    assert (result.kind, pages) == ("AdapterInvalid", None)
    assert f"layer 0 o_proj lora_{half}" in result.message


def test_limits_are_obeyed(tmp_path):
    path = write_adapter(tmp_path / "a", rank=12)
    job = FetchJob(1, path)
    for context in (
        FetchContext(BASE, TARGET, AdapterLimits(max_rank=8)),
        FetchContext(BASE, TARGET, AdapterLimits(target_modules=("q_proj",))),
    ):
        assert fetch(job, context, allocate_private)[0].kind == "AdapterIncompatible"
    outside = FetchContext(BASE, TARGET, AdapterLimits(), roots=(str(tmp_path / "root"),))
    assert fetch(job, outside, allocate_private)[0].kind == "AdapterForbidden"


def test_an_adapter_over_the_byte_limit_is_refused_before_memory_is_taken(tmp_path):
    def allocate(num_pages: int, page_bytes: int) -> torch.Tensor:
        raise AssertionError("nothing may be allocated")

    job = FetchJob(1, write_adapter(tmp_path / "a", rank=12), max_bytes=2 * PAGE_BYTES - 1)
    result, _ = fetch(job, CONTEXT, allocate)
    assert result.kind == "AdapterIncompatible"
    assert str(2 * PAGE_BYTES) in result.message and "--lora-host-bytes" in result.message


@pytest.mark.parametrize("error", [MemoryError("no memory"), OSError(28, "No space left on device")])
def test_what_the_machine_refuses_may_go_well_later(tmp_path, error):
    def allocate(num_pages: int, page_bytes: int) -> torch.Tensor:
        raise error

    result, pages = fetch(FetchJob(1, write_adapter(tmp_path / "a")), CONTEXT, allocate)
    assert (result.kind, pages) == (AdapterUnavailable.__name__, None)
    assert str(error) in result.message


def test_the_inline_loader_works_when_polled(tmp_path):
    loader = InlineLoader(CONTEXT, per_poll=2)
    path = write_adapter(tmp_path / "a")
    for version in (1, 2, 3):
        loader.submit(FetchJob(version, path if version != 2 else "/missing"))
    first, second = loader.poll(), loader.poll()
    assert [(r.version, r.kind) for r, _ in first] == [(1, ""), (2, "AdapterNotFound")]
    assert [(r.version, r.kind) for r, _ in second] == [(3, "")]
    assert loader.poll() == []
    assert loader.fileno() is None
    loader.submit(FetchJob(4, path))
    loader.close()
    assert loader.poll() == []
