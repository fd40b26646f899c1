"""Packing on the GPU: the same bytes as on the CPU, whatever was in the pages; without a GPU Triton interprets.

Covers `device/triton_pack.py` too.
"""

import itertools
import time
from pathlib import Path

import pytest
import torch
from compilers import compile_elsewhere
from pack_tables import named, rows_of

from multilora.adapters import pack_table as constants
from multilora.adapters.device import packing
from multilora.adapters.device.packing import compile_packing
from multilora.adapters.device.ring_copier import RingCopier
from multilora.adapters.device.triton_pack import pack
from multilora.adapters.pack_table import PackTable
from multilora.adapters.packing import placed_jobs
from multilora.adapters.packing.pack_jobs import PackJob, Span, write_jobs
from multilora.adapters.packing.placed_jobs import FileWeight, PlacedJob, pack_table

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16, *([torch.bfloat16] if ON_GPU else [])]  # the interpreter has no bf16
marks = [pytest.mark.gpu] if ON_GPU else []
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]
PAGE, PAGES = 16384, 8
CLOSE = 1e-2  # in bf16


def adapter(stored: torch.dtype, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, PackTable, torch.Tensor]:
    """The numbers of a file, how they are packed, and the packed pages. Ranks of 12 and 40, cut panels, B transposed,
    wider than a block of the kernel."""
    g = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(n, m, generator=g).to(stored) for n, m in ((12, 300), (600, 12), (70, 40)))
    file, at, jobs = torch.cat([x.flatten() for x in (a, b, c)]), 0, []
    weights = []
    for weight, scaling, spans in (
        (a, 1.0, (Span(0, 8, 0, 300, 0), Span(8, 4, 0, 300, PAGE + 128))),
        (b.T, -1.7, (Span(0, 12, 0, 400, 2 * PAGE), Span(0, 12, 400, 200, 3 * PAGE))),
        (c.T, 0.5, (Span(0, 40, 0, 70, 4 * PAGE + 64),)),
    ):
        jobs.append(PackJob("x", weight, scaling, spans))
        weights.append(FileWeight(2 * at, 2 * weight.numel(), [PlacedJob.of(jobs[-1], 0)]))
        at += weight.numel()
    pages = torch.zeros(PAGES, PAGE, dtype=torch.uint8)
    write_jobs(jobs, dtype, pages)
    table = pack_table(weights, 0, 2 * at, dtype)
    assert table is not None
    return file, table, pages


def held(table: PackTable, pages: torch.Tensor, expected: torch.Tensor) -> None:
    """Whatever the table names is as expected, and nothing else has been touched."""
    written, found, wanted = (
        named(table, pages),
        pages.view(torch.int16).view(-1),
        expected.view(torch.int16).view(-1),
    )
    assert torch.equal(found[written], wanted[written])
    assert bool((pages.view(-1, 2)[~written] == 0xAA).all())


@pytest.mark.parametrize("stored", [pytest.param(x, marks=marks) for x in DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_packs_as_the_cpu_does(stored: torch.dtype, dtype: torch.dtype) -> None:
    file, table, expected = adapter(stored, dtype)
    places = [11, 3, 4, 0, 9, 7, 8, 1]
    arena = torch.full((12, PAGE), 0xAA, dtype=torch.uint8, device=DEVICE)
    compile_packing(arena, dtype)
    rows = torch.tensor(rows_of(table), device=DEVICE)
    pack(file.to(DEVICE), arena.view(dtype), rows, torch.tensor(places, device=DEVICE), 400)
    held(table, arena[places].cpu(), expected)
    assert bool((arena[[2, 5, 6, 10]] == 0xAA).all())


@pytest.mark.slow
def test_a_compiler_takes_it() -> None:
    assert len(compile_elsewhere("compile_small.py", "pack")) == 2


@pytest.mark.parametrize("pinned", [pytest.param(x, marks=gpu) for x in (False, True)])
@pytest.mark.parametrize("part_bytes", [constants.PART_BYTES, 16_000])
def test_adapters_from_host_memory(pinned: bool, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other and at once, with tables that are known and not, in parts."""
    monkeypatch.setattr(placed_jobs, "PART_BYTES", part_bytes)
    monkeypatch.setattr(packing, "KEPT_TABLES", 1)
    arena = torch.full((64, PAGE), 0xAA, dtype=torch.uint8, device="cuda")
    copier, order = RingCopier(arena, slots=2, slot_bytes=2 * PAGE), torch.randperm(64).tolist()
    running = []
    for seed, stored in itertools.product(range(3), DTYPES):
        file, table, expected = adapter(stored, torch.bfloat16, seed)
        places = [order.pop() for _ in range(PAGES)]
        raw = torch.zeros(-(-table.nbytes // PAGE), PAGE, dtype=torch.uint8, pin_memory=pinned)
        raw.view(-1)[: table.nbytes] = file.view(torch.uint8)
        running.append((copier.start_copy(raw, places, table), raw, places, table, expected))
    for copy, _, places, table, expected in running:
        end = time.monotonic() + 60
        while not copy.done():
            assert time.monotonic() < end
            time.sleep(0.001)
        held(table, arena[places].cpu(), expected)
    copier.close()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_an_llm_says_the_same_with_what_its_gpu_packs(tmp_path: Path) -> None:
    """Adapters of one layout, loaded one after the other, evicted and loaded again, against those that the CPU packs
    in steps' order: token for token."""
    from fakes.models import make_adapter, make_tiny_model

    from multilora import LLM

    make_tiny_model(tmp_path / "model", "llama", vocab_size=512, hidden_size=256, intermediate_size=512,
                    num_attention_heads=2, head_dim=128)  # fmt: skip
    names = [f"a{i}" for i in range(4)]
    for seed, name in enumerate(names):
        make_adapter(tmp_path / name, tmp_path / "model", seed=seed, dtype="bfloat16", r=12, lora_alpha=5,
                     target_modules="all-linear")  # fmt: skip
    prompts = torch.randint(3, 500, (4, 40), generator=torch.Generator().manual_seed(0)).tolist()
    said = []
    for beside in (False, True):
        options = {"enable_lora_overlap_loading": beside, "max_loras_per_batch": 2, "random_seed": 0}
        with LLM(str(tmp_path / "model"), enable_lora=True, dtype="bfloat16", skip_tokenizer_init=True,
                 mem_fraction_static=0.3, **options) as llm:  # fmt: skip
            for name in names:
                llm.load_lora_adapter(name, str(tmp_path / name))
            packed = [a.host.table is not None for a in llm.engine.adapters._adapters.values() if a.host is not None]
            assert sum(packed) == (3 if beside else 0), "the first of them is packed by the CPU"
            params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
            said.append([llm.generate(prompts, params, lora_path=names, return_logprob=True) for _ in range(2)])
    cpu, gpu = ([answer for answers in rounds for answer in answers] for rounds in said)
    assert [answer.token_ids for answer in gpu] == [answer.token_ids for answer in cpu]
    for one, other in zip(gpu, cpu, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=CLOSE), "steps may have other rows beside"
