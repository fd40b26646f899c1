"""FlashInfer's paged attention against the torch backend on CPU in fp32: batches, windows, a large arena, graphs."""

import logging
import random
from dataclasses import dataclass, replace

import pytest
import torch

from multilora.attention.backends import choose_attention, make_attention
from multilora.attention.base import AttentionBackend, AttentionShape
from multilora.attention.rotate import CosSin
from multilora.attention.torch_sdpa import KVViews, TorchAttention
from multilora.batch import AttentionMeta
from multilora.memory.kv_layout import KVLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
KIND = torch.bfloat16
LARGE = 91 * 10**9  # bytes of an arena
LAYERS = 2
LLAMA = (8, 2, 128)  # heads, KV heads, head_dim: kernels without a window
SMALL = (6, 2, 64)  # kernels with one
BATCHES = {
    "one token": [(1, 1)],
    "one decode": [(1, 18)],
    "one long decode": [(1, 5000)],
    "decodes": [(1, 5), (1, 33), (1, 1), (1, 16), (1, 17), (1, 900)],
    "fresh prefill": [(13, 13), (2, 2), (320, 320)],
    "chunks": [(5, 20), (7, 8), (160, 480), (2, 333)],
    "mixed": [(1, 40), (9, 9), (1, 3), (60, 500), (1, 977), (3, 16), (1, 1)],
    "one row over a tile": [(129, 269), (65, 65), (1, 8), (257, 300)],
    "mixed, prefill first": [(31, 31), (1, 64), (200, 300)],
}


@dataclass
class Case:
    """A step: its arena, its page tables, and what the layers are given."""

    meta: AttentionMeta
    arena: torch.Tensor
    layout: KVLayout
    qkv: torch.Tensor  # [LAYERS, T, heads + 2 · KV heads, head_dim], merged as the model has it
    rope: CosSin
    heads: tuple[int, int, int]  # of q, k, v

    def views(self) -> KVViews:
        return self.layout.views(self.arena)


def make_case(
    lens: list[tuple[int, int]],
    shape: tuple[int, int, int],
    *,
    page_size: int = 16,
    seed: int = 0,
    dtype: torch.dtype = KIND,
    base_page: int = 0,
    arena: torch.Tensor | None = None,
) -> Case:
    """lens: (new tokens, tokens in all). Pages are dealt at random from `base_page` on, all full of random values."""
    heads, kv_heads, head_dim = shape
    rng = random.Random(seed)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    layout = KVLayout(LAYERS, page_size, kv_heads, head_dim, dtype)
    counts = [layout.pages_for(total) for _, total in lens]
    deck = list(range(base_page, base_page + sum(counts) + 5))
    if arena is None:
        arena = torch.empty(deck[-1] + 1, layout.page_bytes, dtype=torch.uint8, device=DEVICE)
    used = arena[base_page:].view(dtype)
    used.copy_(torch.randn(used.shape, generator=generator, device=DEVICE))
    rng.shuffle(deck)
    table = torch.zeros(len(lens), max(counts) + 2, dtype=torch.int64)
    token_page, token_slot = [], []
    for r, (new, total) in enumerate(lens):
        pages = [deck.pop() for _ in range(counts[r])]
        table[r, : len(pages)] = torch.tensor(pages)
        token_page += [pages[t // page_size] for t in range(total - new, total)]
        token_slot += [t % page_size for t in range(total - new, total)]
    tokens = len(token_page)
    angle = torch.randn(tokens, 1, head_dim // 2, generator=generator, device=DEVICE)
    shape_of_all = (LAYERS, tokens, heads + 2 * kv_heads, head_dim)
    return Case(
        AttentionMeta(
            *zip(*lens, strict=True),
            table.to(DEVICE),
            torch.tensor(token_page, device=DEVICE),
            torch.tensor(token_slot, device=DEVICE),
        ),
        arena,
        layout,
        torch.randn(shape_of_all, generator=generator, device=DEVICE).to(dtype),
        (angle.cos(), angle.sin()),
        (heads, kv_heads, kv_heads),
    )


def flashinfer(case: Case, window: int | None) -> AttentionBackend:
    heads, kv_heads, _ = case.heads
    shape = AttentionShape(heads, kv_heads, case.layout.head_dim, 0.09, window)
    return make_attention("flashinfer", case.views(), shape)


def expected(case: Case, window: int | None, device: str = "cpu") -> list[torch.Tensor]:
    """Per layer [T, heads, head_dim] in fp32, from the torch backend over an fp32 copy of the arena."""
    heads, kv_heads, _ = case.heads
    wide = replace(case.layout, dtype=torch.float32)
    views = wide.views(case.arena.to(device).view(case.layout.dtype).float().view(torch.uint8))
    attention = TorchAttention(views, AttentionShape(heads, kv_heads, case.layout.head_dim, 0.09, window))
    meta, (cos, sin), qkv = case.meta, case.rope, case.qkv.to(device).float()
    tensors = (t.to(device) for t in (meta.page_table, meta.token_page, meta.token_slot))
    attention.prepare(AttentionMeta(meta.q_lens, meta.kv_lens, *tensors))
    rope = (cos.to(device), sin.to(device))
    return [
        attention.forward(layer, *qkv[layer].split(case.heads, dim=1), rope).to(DEVICE) for layer in range(LAYERS)
    ]


def forward(attention: AttentionBackend, case: Case) -> list[torch.Tensor]:
    return [attention.forward(layer, *case.qkv[layer].split(case.heads, dim=1), case.rope) for layer in range(LAYERS)]


def check(got: list[torch.Tensor], want: list[torch.Tensor], dtype: torch.dtype = KIND) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype and g.shape == w.shape
        assert torch.isfinite(g).all()
        for row, wanted in zip(g.float().flatten(1), w.flatten(1), strict=True):  # no row hides behind the others
            error = (row - wanted).norm() / wanted.norm()
            assert error < 1e-2, error


def forward_once(case: Case, window: int | None = None) -> list[torch.Tensor]:
    attention = flashinfer(case, window)
    attention.prepare(case.meta)
    return forward(attention, case)


def run(case: Case, window: int | None) -> None:
    want = expected(case, window)
    check(forward_once(case, window), want)


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch: str) -> None:
    run(make_case(BATCHES[batch], LLAMA), None)


@pytest.mark.parametrize("window", [1, 6, 100, 10000])
@pytest.mark.parametrize("batch", BATCHES)
def test_windows(batch: str, window: int) -> None:
    run(make_case(BATCHES[batch], SMALL), window)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("batch", BATCHES)
def test_torch_on_cuda_is_torch_on_cpu(batch: str, window: int | None) -> None:
    case = make_case(BATCHES[batch], LLAMA)
    for got, want in zip(expected(case, window, "cuda"), expected(case, window), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("page_size", [1, 5, 64])
@pytest.mark.parametrize("heads", [(32, 8), (4, 4), (14, 2), (16, 1), (3, 1)])
def test_groups_and_page_sizes(heads: tuple[int, int], page_size: int) -> None:
    run(make_case(BATCHES["mixed"], (*heads, 128), page_size=page_size), None)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_pages_of_8_bit_floats(stored: torch.dtype) -> None:
    """Each is a compilation. New keys are rounded to bf16 first here, and not in the comparison."""
    case = make_case(BATCHES["mixed"], LLAMA, dtype=stored)
    generator = torch.Generator(DEVICE).manual_seed(1)
    case.qkv = torch.randn(case.qkv.shape, generator=generator, device=DEVICE).to(KIND)
    heads, kv_heads, _ = case.heads
    shape = AttentionShape(heads, kv_heads, 128, 0.09, None, kv_scales=((0.5, 2.0),) * LAYERS)
    twin = TorchAttention(case.layout.views(case.arena.cpu()), shape)
    attention = make_attention("flashinfer", case.views(), shape, KIND)
    attention.prepare(case.meta)
    got = forward(attention, case)
    meta, (cos, sin), qkv = case.meta, case.rope, case.qkv.cpu().float()
    tensors = (t.cpu() for t in (meta.page_table, meta.token_page, meta.token_slot))
    twin.prepare(AttentionMeta(meta.q_lens, meta.kv_lens, *tensors))
    for layer, found in enumerate(got):
        want = twin.forward(layer, *qkv[layer].split(case.heads, dim=1), (cos.cpu(), sin.cpu()))
        assert (found.cpu().float() - want).norm() / want.norm() < 3e-2


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 128), (KIND, 256)])
def test_other_types_and_head_sizes(dtype: torch.dtype, head_dim: int) -> None:
    """Each is a compilation of FlashInfer's, one to three minutes where it has not been done yet."""
    case = make_case(BATCHES["mixed"], (8, 2, head_dim), dtype=dtype)
    want = expected(case, None)
    check(forward_once(case), want, dtype)


@pytest.mark.parametrize("seed", range(10))
def test_random_batches_of_one_backend(seed: int) -> None:
    """The same wrappers, step after step."""
    rng = random.Random(seed)
    arena = make_case([(1, 16 * 1000)], LLAMA).arena
    attention = None
    for step in range(4):
        lens = []
        for _ in range(rng.randint(1, 40)):
            total = rng.randint(1, 300)
            lens.append((rng.choice([1, 1, 1, rng.randint(1, total)]), total))
        case = make_case(lens, LLAMA, seed=100 * seed + step, arena=arena)
        attention = attention or flashinfer(case, None)
        want = expected(case, None)
        attention.prepare(case.meta)
        check(forward(attention, case), want)


def test_only_new_tokens_are_written() -> None:
    case = make_case(BATCHES["mixed"], LLAMA)
    before = case.arena.clone()
    run(case, None)
    meta = case.meta
    for k, v in [*case.views(), *case.layout.views(before)]:
        k[meta.token_page, meta.token_slot] = 0
        v[meta.token_page, meta.token_slot] = 0
    assert torch.equal(before, case.arena)


def test_pages_at_the_end_of_a_large_arena() -> None:
    """Elements beyond 2^32, bytes beyond 90 GB; neighbouring pages lie 1 MB apart in one layer."""
    shape, lens = (32, 8, 128), [(1, 700), (40, 90), (1, 17)]
    page_bytes = KVLayout(LAYERS, 64, 8, 128, KIND).page_bytes
    small = make_case(lens, shape, page_size=64)
    count, most = small.arena.shape[0], torch.cuda.mem_get_info()[0] - (4 << 30)
    if most < LARGE:
        pytest.skip(f"needs 91 GB of free device memory, here are {most / 1e9:.0f}")
    arena = torch.empty(LARGE // page_bytes, page_bytes, dtype=torch.uint8, device=DEVICE)
    large = make_case(lens, shape, page_size=64, arena=arena, base_page=arena.shape[0] - count)
    assert torch.equal(arena[-count:], small.arena) and (large.meta.page_table.max() > 90e9 // page_bytes)
    check(forward_once(large), expected(small, None))
    for got, want in zip(forward_once(large), forward_once(small), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(arena[-count:], small.arena)


def pad(case: Case, rows: int) -> Case:
    """The same step with rows of padding behind, NaN so that a leak shows."""
    qkv = torch.full((LAYERS, rows, *case.qkv.shape[2:]), torch.nan, dtype=KIND, device=DEVICE)
    qkv[:, : case.qkv.shape[1]] = case.qkv
    rope = tuple(torch.nn.functional.pad(t, (0, 0, 0, 0, 0, rows - len(t))) for t in case.rope)
    return replace(case, qkv=qkv, rope=rope)  # type: ignore[arg-type]


class Graph:
    """Both layers of a step of `rows` decodes, captured over static inputs."""

    def __init__(self, attention: AttentionBackend, case: Case, rows: int):
        self.twin = attention.for_graph(rows)
        assert self.twin is not None
        self.static = pad(case, rows)
        self.static = replace(self.static, rope=tuple(t.clone() for t in self.static.rope))
        self.twin.prepare(case.meta)
        forward(self.twin, self.static)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = forward(self.twin, self.static)

    def replay(self, case: Case) -> list[torch.Tensor]:
        padded = pad(case, self.static.qkv.shape[1])
        self.twin.prepare(case.meta)
        self.static.qkv.copy_(padded.qkv)
        for to, value in zip(self.static.rope, padded.rope, strict=True):
            to.copy_(value)
        self.graph.replay()
        return [out[: case.qkv.shape[1]].clone() for out in self.out]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("batch", BATCHES)
def test_in_two_halves(batch: str, window: int | None) -> None:
    """The first one captured, over more rows than the step has; a step before it has filled all of them, decodes and
    prompts in turns."""
    shape = SMALL if window else LLAMA
    case = make_case(BATCHES[batch], shape)
    want = expected(case, window)
    attention = flashinfer(case, window)
    rows = (case.qkv.shape[1] + 7) // 4 * 4 + 8
    assert attention.for_pieces(rows + 20) is not None
    halves = attention.for_pieces(rows)
    assert halves is not None
    static = pad(case, rows)
    traces = make_case([(3, 3), (1, 1)] * (rows // 4), shape)
    assert traces.qkv.shape[1] == rows
    graphs = []
    for layer in range(LAYERS):
        q, k, v = static.qkv[layer].split(case.heads, dim=1)
        halves.rotate(layer, q, k, v, static.rope)  # nothing is prepared: nothing is written
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            halves.rotate(layer, q, k, v, static.rope)
    pages = len(case.arena)
    before_it = traces.meta.page_table % pages, traces.meta.token_page % pages
    halves.prepare(replace(traces.meta, page_table=before_it[0], token_page=before_it[1]))
    halves.out.fill_(torch.nan)
    before = case.arena.clone()
    halves.prepare(case.meta)
    got = []
    for layer, graph in enumerate(graphs):
        graph.replay()
        halves.attend(layer)
        got.append(halves.out[: case.qkv.shape[1]].clone())
    check(got, want)
    for k, v in [*case.views(), *case.layout.views(before)]:
        k[case.meta.token_page, case.meta.token_slot] = 0
        v[case.meta.token_page, case.meta.token_slot] = 0
    assert torch.equal(before, case.arena), "padding wrote something"


def decode_steps(count: int, most: int, arena: torch.Tensor, window: bool) -> list[Case]:
    rng = random.Random(5)
    shape = SMALL if window else LLAMA
    cases = []
    for step in range(count):
        lens = [(1, rng.choice([1, 2, 16, 17, rng.randint(1, 2000)])) for _ in range(rng.randint(1, most))]
        cases.append(make_case(lens, shape, seed=step, arena=arena))
    return cases


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_replays(rows: int, window: int | None) -> None:
    shape = SMALL if window else LLAMA
    arena = make_case([(1, 16 * 2100)], shape).arena
    first = make_case([(1, 9)] * rows, shape, arena=arena)
    graph = Graph(flashinfer(first, window), first, rows)
    for case in decode_steps(6, rows, arena, window is not None):
        arena.view(KIND).normal_(generator=torch.Generator(DEVICE).manual_seed(1))
        before = arena.clone()
        want = expected(case, window)
        check(graph.replay(case), want)
        for k, v in [*case.views(), *case.layout.views(before)]:
            k[case.meta.token_page, case.meta.token_slot] = 0
            v[case.meta.token_page, case.meta.token_slot] = 0
        assert torch.equal(before, arena), "padding wrote something"


def test_the_host_may_run_ahead() -> None:
    """Steps are prepared while earlier ones have not begun: no plan overtakes another in the staging buffers."""
    rows, arena = 8, make_case([(1, 16 * 2100)], LLAMA).arena
    first = make_case([(1, 9)] * rows, LLAMA, arena=arena)
    eager = flashinfer(first, None)
    graph = Graph(eager, first, rows)
    cases = decode_steps(12, rows, arena, False)
    arena.view(KIND).normal_(generator=torch.Generator(DEVICE).manual_seed(1))
    kept = arena.clone()
    want = []
    for case in cases:
        arena.copy_(kept)
        want.append(expected(case, None))
    got = []
    for i, case in enumerate(cases):
        arena.copy_(kept)
        torch.cuda._sleep(20_000_000)  # about 10 ms
        if i % 2:
            got.append(graph.replay(case))
        else:
            eager.prepare(case.meta)
            got.append(forward(eager, case))
    for g, w in zip(got, want, strict=True):
        check(g, w)


def test_auto_takes_it_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "multilora.attention"):
        assert choose_attention("auto", DEVICE, KIND, KIND, AttentionShape(8, 8, 128, 1.0, None)) == "flashinfer"
    assert "attention backend: flashinfer" in caplog.text


def test_the_first_compilation_is_announced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multilora.attention import flashinfer as module

    case = make_case([(1, 4)], LLAMA)
    for compiled in (True, False):
        caplog.clear()
        monkeypatch.setattr(module, "_is_compiled", lambda shape, compiled=compiled: compiled)
        with caplog.at_level(logging.INFO, "multilora.attention"):
            flashinfer(case, None)
        assert ("compiling attention kernels, once" in caplog.text) != compiled


def test_triton_serves_until_the_kernels_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from multilora.attention import flashinfer as module

    monkeypatch.setattr(module, "_is_compiled", lambda shape: False)
    case = make_case(BATCHES["mixed"], LLAMA)
    want = expected(case, None)
    heads, kv_heads, dim = LLAMA
    attention = module.FlashInferAttention(case.views(), AttentionShape(heads, kv_heads, dim, 0.09, None), wait=False)
    [prefill] = attention._prefills
    prefill._build.join(300)
    assert prefill._build.ready
    for ready in (False, True):
        prefill._build.ready = ready
        attention.prepare(case.meta)
        assert (prefill._active is prefill._preferred) == ready
        check(forward(attention, case), want)
