"""The kernels of drawing on CUDA; `triton_sampling.py` launches them and explains how they work together.

`numbers` is `SamplingBatch.numbers`, float64 [len(Column), rows]. A logit's *key* is the int32 in the order of the
floats. A token's *weight* is exp((logit − best) / temperature) as an integer, 2^36 for the best token: sums of
weights are exact, whatever the order of summation. What is below 2^-36 weighs nothing: in a vocabulary of 2^17 that
is 2e-6 of the best token's share at most, all such tokens together, which is what fp32 gets wrong anyway.

The search for a row's cut keeps a state per pass and row, int64 [4, BUCKETS]: the pivots (keys, ascending); how many
keys there are from each pivot on up to `hi`; their weight; (hi, count above hi, weight above hi, candidates found).
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from multilora.engine.sampling.batch import Column, Kind, Source
from multilora.kernels.triton_launch import wait_for_previous

KIND = tl.constexpr(int(Column.KIND))
TEMPERATURE = tl.constexpr(int(Column.TEMPERATURE))
TOP_P = tl.constexpr(int(Column.TOP_P))
TOP_K = tl.constexpr(int(Column.TOP_K))
MIN_P = tl.constexpr(int(Column.MIN_P))
UNIFORM = tl.constexpr(int(Column.UNIFORM))
COUNTS = tl.constexpr(int(Column.COUNTS))
SOURCE = tl.constexpr(int(Column.SOURCE))
GREEDY = tl.constexpr(int(Kind.GREEDY))
TRUNCATED = tl.constexpr(int(Kind.TRUNCATED))
RAW = tl.constexpr(int(Source.RAW))
TEMPERED = tl.constexpr(int(Source.TEMPERED))

ONE = tl.constexpr(2.0**36)  # the weight of a row's best token
COUNT_BITS = tl.constexpr(50)  # counts stand above the weights of 2^13 tokens, in the same 64 bits
COUNT = tl.constexpr(1 << 50)
LOWEST = tl.constexpr(-2139095041)  # the key of −inf
BELOW_ALL = tl.constexpr(-2147483648)  # a pivot that every key is above
NO_MASS = tl.constexpr((1 << 63) - 1)  # more than any row weighs


@triton.jit
def _key(x):
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # −0 counts as 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    """The float whose key it is."""
    key = key.to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def number(numbers_ptr, column: tl.constexpr, row, rows):
    return tl.load(numbers_ptr + rows * column + row)


@triton.jit
def _scale(numbers_ptr, row, rows):
    return (1.4426950408889634 / number(numbers_ptr, TEMPERATURE, row, rows)).to(tl.float32)  # log2(e) / temperature


@triton.jit
def _weight(x, best, scale):
    """int64. NaN weighs nothing. A product and a power, with no sum that a compiler could contract: every kernel gets
    the same integers."""
    distance = (x - best) * scale
    return (tl.where(distance <= 0.0, tl.exp2(distance), 0.0) * ONE).to(tl.int64)


@triton.jit
def _least(numbers_ptr, row, rows):
    """int64: the weight that min-p asks for."""
    return tl.ceil(number(numbers_ptr, MIN_P, row, rows) * ONE).to(tl.int64)


# ---------------------------------------------------------------------- the search for the cut


@triton.jit
def _wanted(numbers_ptr, first_ptr, row, rows, vocab, BUCKETS: tl.constexpr):
    """(count, weight): a row keeps its best tokens until either is reached. first_ptr: the state of the first pass,
    whose lowest pivot is below all tokens."""
    count = tl.minimum(number(numbers_ptr, TOP_K, row, rows), vocab).to(tl.int64)
    top_p = number(numbers_ptr, TOP_P, row, rows)
    total = tl.load(first_ptr + row * 4 * BUCKETS + 2 * BUCKETS)
    mass = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
    return count, tl.where(top_p < 1.0, mass, NO_MASS)


@triton.jit
def _narrowed(state_ptr, first_ptr, numbers_ptr, row, rows, vocab, BUCKETS: tl.constexpr):
    """What a pass found: the last kept key is in [lo, hi]. Returns (lo, hi, count above hi, weight above hi)."""
    j = tl.arange(0, BUCKETS)
    at = state_ptr + row * 4 * BUCKETS
    hi, above, above_mass = tl.load(at + 3 * BUCKETS), tl.load(at + 3 * BUCKETS + 1), tl.load(at + 3 * BUCKETS + 2)
    pivots = tl.load(at + j)
    counts = tl.load(at + BUCKETS + j) + above
    masses = tl.load(at + 2 * BUCKETS + j) + above_mass
    count, mass = _wanted(numbers_ptr, first_ptr, row, rows, vocab, BUCKETS)
    enough = (j == 0) | (counts >= count) | (masses >= mass)  # true up to some pivot, of the lowest by construction
    bucket = tl.sum(enough.to(tl.int32), axis=0) - 1
    lo = tl.sum(tl.where(j == bucket, pivots, 0), axis=0)
    if bucket < BUCKETS - 1:
        hi = tl.sum(tl.where(j == bucket + 1, pivots, 0), axis=0) - 1
        above = tl.sum(tl.where(j == bucket + 1, counts, 0), axis=0)
        above_mass = tl.sum(tl.where(j == bucket + 1, masses, 0), axis=0)
    return lo, hi, above, above_mass


@triton.jit
def _pivots(lo, hi, best, FIRST: tl.constexpr, BUCKETS: tl.constexpr):
    """int64 [BUCKETS], ascending from `lo`. First below the best logit at distances that double; later in equal steps
    between the values of lo and hi, or between their keys if there is no end to the values."""
    j = tl.arange(0, BUCKETS)
    if FIRST:
        between = _key(best - tl.exp2((BUCKETS - 2 - j).to(tl.float32))).to(tl.int64)
    else:
        bottom, width = _value(lo), _value(hi) - _value(lo)
        by_value = _key(bottom + width * (j.to(tl.float32) / BUCKETS)).to(tl.int64)
        by_key = lo + ((hi - lo) * j) // BUCKETS
        between = tl.where(width < float("inf"), by_value, by_key)
    return tl.where(j == 0, lo, tl.minimum(tl.maximum(between, lo), hi))


@triton.jit(do_not_specialize=["rows"])
def narrow(logits_ptr, best_ptr, numbers_ptr, before_ptr, state_ptr, first_ptr, rows, vocab, stride,
           BLOCK: tl.constexpr, BUCKETS: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per (row, block): counts and weights from each pivot on, added into `state`, which is zero before.
    Integers, so the order of the programs does not matter."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    if number(numbers_ptr, KIND, row, rows) == TRUNCATED:
        best = tl.load(best_ptr + row)
        if FIRST:
            lo, hi = tl.full((), LOWEST, tl.int64), _key(best).to(tl.int64)
            above, above_mass = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        else:
            lo, hi, above, above_mass = _narrowed(before_ptr, first_ptr, numbers_ptr, row, rows, vocab, BUCKETS)
        j = tl.arange(0, BUCKETS)
        pivots = _pivots(lo, hi, best, FIRST, BUCKETS)
        at = state_ptr + row * 4 * BUCKETS
        if tl.program_id(1) == 0:
            tl.store(at + j, pivots)
            tl.store(at + 3 * BUCKETS, hi)
            tl.store(at + 3 * BUCKETS + 1, above)
            tl.store(at + 3 * BUCKETS + 2, above_mass)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * stride + i, mask=i < vocab, other=float("nan"))
        key = _key(x)  # that of NaN is above every hi
        weight = _weight(x, best, _scale(numbers_ptr, row, rows))
        key = tl.where((i < vocab) & (key <= hi), key, BELOW_ALL)
        both = weight + COUNT  # one sum for two: 8192 times both fit 64 bits, without a sign
        for bucket in tl.static_range(1 - FIRST, BUCKETS):
            pivot = tl.sum(tl.where(j == bucket, pivots, 0), axis=0).to(tl.int32)
            found = tl.sum(tl.where(key >= pivot, both, 0), axis=0)
            if found != 0:
                tl.atomic_add(at + BUCKETS + bucket, (found.to(tl.uint64) >> COUNT_BITS).to(tl.int64))
                tl.atomic_add(at + 2 * BUCKETS + bucket, found & (COUNT - 1))


@triton.jit(do_not_specialize=["rows"])
def collect(logits_ptr, numbers_ptr, state_ptr, first_ptr, candidates_ptr, rows, vocab, stride,
            BLOCK: tl.constexpr, BUCKETS: tl.constexpr, CAPACITY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per (row, block): copy the logits that the passes left undecided to `candidates`, in any order."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    if number(numbers_ptr, KIND, row, rows) == TRUNCATED:
        lo, hi, _, _ = _narrowed(state_ptr, first_ptr, numbers_ptr, row, rows, vocab, BUCKETS)
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * stride + i, mask=i < vocab, other=float("nan"))
        key = _key(x)
        inside = (i < vocab) & (key >= lo) & (key <= hi)
        count = tl.sum(inside.to(tl.int32), axis=0)
        if count > 0:
            base = tl.atomic_add(state_ptr + row * 4 * BUCKETS + 3 * BUCKETS + 3, count.to(tl.int64))
            place = base + tl.cumsum(inside.to(tl.int32), axis=0) - 1
            tl.store(candidates_ptr + row * CAPACITY + place, x, mask=inside & (place < CAPACITY))


@triton.jit
def _bisect(x_ptr, size, best, scale, lo, hi, above, above_mass, count, mass, BLOCK: tl.constexpr):
    """(last kept key, how many keys there are above it, their weight), from `size` logits of which those with keys in
    [lo, hi] matter."""
    i = tl.arange(0, BLOCK)
    lowest, highest = hi, lo
    for start in range(0, size, BLOCK):
        key = _key(tl.load(x_ptr + start + i, mask=start + i < size, other=float("nan"))).to(tl.int64)
        inside = (start + i < size) & (key >= lo) & (key <= hi)
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, key, hi), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(inside, key, lo), axis=0))
    top = hi
    lo, hi = lowest, highest
    tail, tail_mass = above, above_mass  # of the keys above `top`
    while lo < hi:
        middle = lo + (hi - lo + 1) // 2
        counts, masses = tail, tail_mass  # of the keys from `middle` on
        for start in range(0, size, BLOCK):
            x = tl.load(x_ptr + start + i, mask=start + i < size, other=float("nan"))
            key = _key(x).to(tl.int64)
            inside = (start + i < size) & (key >= middle) & (key <= top)
            counts += tl.sum(inside.to(tl.int32), axis=0).to(tl.int64)
            masses += tl.sum(tl.where(inside, _weight(x, best, scale), 0), axis=0)
        if (counts >= count) | (masses >= mass):
            lo = middle
        else:
            hi = middle - 1
            above = counts
            above_mass = masses
    return lo, above, above_mass


@triton.jit(do_not_specialize=["rows"])
def select(logits_ptr, best_ptr, numbers_ptr, state_ptr, first_ptr, candidates_ptr, cut_ptr, rows, vocab, stride,
           BLOCK: tl.constexpr, BUCKETS: tl.constexpr, CAPACITY: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per row: bisect the candidates, or all logits if there are more than CAPACITY. Writes the cut,
    int64 [rows, 2]: the last kept key, and how many tokens of that key stay."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    if number(numbers_ptr, KIND, row, rows) == TRUNCATED:
        lo, hi, above, above_mass = _narrowed(state_ptr, first_ptr, numbers_ptr, row, rows, vocab, BUCKETS)
        count, mass = _wanted(numbers_ptr, first_ptr, row, rows, vocab, BUCKETS)
        best, scale = tl.load(best_ptr + row), _scale(numbers_ptr, row, rows)
        size = tl.load(state_ptr + row * 4 * BUCKETS + 3 * BUCKETS + 3).to(tl.int32)
        if size <= CAPACITY:
            pivot, above, above_mass = _bisect(candidates_ptr + row * CAPACITY, size, best, scale,
                                               lo, hi, above, above_mass, count, mass, BLOCK)  # fmt: skip
        else:
            pivot, above, above_mass = _bisect(logits_ptr + row * stride, vocab, best, scale,
                                               lo, hi, above, above_mass, count, mass, BLOCK)  # fmt: skip
        weight = _weight(_value(pivot), best, scale)
        quota = count - above
        if (weight > 0) & (mass < NO_MASS):
            quota = tl.minimum(quota, (mass - above_mass + weight - 1) // weight)
        tl.store(cut_ptr + 2 * row, pivot)
        tl.store(cut_ptr + 2 * row + 1, tl.maximum(quota, 1))


# ---------------------------------------------------------------------- the draw


@triton.jit
def _cut(cut_ptr, numbers_ptr, best, row, rows):
    """(pivot, quota): a row keeps keys above `pivot` and the first `quota` tokens of that key."""
    kind = number(numbers_ptr, KIND, row, rows)
    pivot, quota = tl.full((), BELOW_ALL, tl.int64), tl.full((), 0, tl.int64)
    if kind == GREEDY:
        pivot, quota = _key(best).to(tl.int64), tl.full((), 1, tl.int64)
    if kind == TRUNCATED:
        pivot, quota = tl.load(cut_ptr + 2 * row), tl.load(cut_ptr + 2 * row + 1)
    return pivot.to(tl.int32), quota


@triton.jit(do_not_specialize=["rows"])
def weigh(logits_ptr, best_ptr, numbers_ptr, cut_ptr, masses_ptr, equals_ptr, rows, vocab, stride,
          BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per (row, block of tokens): the weight of its tokens above the pivot, int64 [rows, blocks], and how
    many equal the pivot, int32 [rows, blocks]."""
    wait_for_previous(PDL)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best = tl.load(best_ptr + row)
    pivot, _ = _cut(cut_ptr, numbers_ptr, best, row, rows)
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + i, mask=i < vocab, other=float("-inf"))
    key, weight = _key(x), _weight(x, best, _scale(numbers_ptr, row, rows))
    kept = (key > pivot) & (weight >= _least(numbers_ptr, row, rows))
    at = row * tl.num_programs(1) + block
    tl.store(masses_ptr + at, tl.sum(tl.where(kept, weight, 0), axis=0))
    tl.store(equals_ptr + at, tl.sum(((key == pivot) & (i < vocab)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["rows", "counts_width"])
def choose(logits_ptr, best_ptr, numbers_ptr, cut_ptr, masses_ptr, equals_ptr, counts_ptr, tokens_ptr,
           rows, vocab, stride, blocks, counts_width,
           BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per row: invert the cumulative weights, in order of token ids, first among blocks, then within one.
    Counts the token if the row has penalties."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    best, scale = tl.load(best_ptr + row), _scale(numbers_ptr, row, rows)
    pivot, quota = _cut(cut_ptr, numbers_ptr, best, row, rows)
    least = _least(numbers_ptr, row, rows)
    pivot_weight = _weight(_value(pivot), best, scale)
    pivot_weight = tl.where(pivot_weight >= least, pivot_weight, 0)

    b = tl.arange(0, BLOCKS)
    equals = tl.load(equals_ptr + row * blocks + b, mask=b < blocks, other=0).to(tl.int64)
    masses = tl.load(masses_ptr + row * blocks + b, mask=b < blocks, other=0)
    ranks = tl.cumsum(equals, axis=0) - equals  # of each block's first token that equals the pivot
    masses += tl.minimum(tl.maximum(quota - ranks, 0), equals) * pivot_weight
    total = tl.sum(masses, axis=0)
    uniform = number(numbers_ptr, UNIFORM, row, rows)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    block = tl.sum(((tl.cumsum(masses, axis=0) <= target) & (b < blocks)).to(tl.int32), axis=0)
    block = tl.minimum(block, blocks - 1)
    before = tl.sum(tl.where(b < block, masses, 0), axis=0)
    rank = tl.sum(tl.where(b < block, equals, 0), axis=0)

    i = tl.arange(0, BLOCK)
    inside = block * BLOCK + i < vocab
    x = tl.load(logits_ptr + row * stride + block * BLOCK + i, mask=inside, other=float("-inf"))
    key, weight = _key(x), _weight(x, best, scale)
    equal = (key == pivot) & inside
    kept = (key > pivot) | (equal & (rank + tl.cumsum(equal.to(tl.int32), axis=0) <= quota))
    cumulative = before + tl.cumsum(tl.where(kept & (weight >= least), weight, 0), axis=0)
    token = block * BLOCK + tl.sum((cumulative <= target).to(tl.int32), axis=0)
    token = tl.minimum(token, vocab - 1).to(tl.int64)
    tl.store(tokens_ptr + row, token)
    counts_row = number(numbers_ptr, COUNTS, row, rows).to(tl.int64)
    if counts_row > 0:
        tl.atomic_add(counts_ptr + counts_row * counts_width + tl.minimum(token, counts_width - 1), 2)


@triton.jit(do_not_specialize=["rows"])
def process(raw_ptr, logits_ptr, best_ptr, numbers_ptr, cut_ptr, equals_ptr, out_ptr,
            rows, vocab, raw_stride, stride, blocks,
            BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One program per (row, block): what a row's logprobs are the log-softmax of, by its `Source`."""
    wait_for_previous(PDL)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < vocab
    source = number(numbers_ptr, SOURCE, row, rows)
    if source == RAW:
        x = tl.load(raw_ptr + row * raw_stride + i, mask=inside, other=0.0)
    else:
        x = tl.load(logits_ptr + row * stride + i, mask=inside, other=float("-inf"))
        if source == TEMPERED:
            best = tl.load(best_ptr + row)
            pivot, quota = _cut(cut_ptr, numbers_ptr, best, row, rows)
            b = tl.arange(0, BLOCKS)
            equals = tl.load(equals_ptr + row * blocks + b, mask=(b < blocks) & (b < block), other=0)
            rank = tl.sum(equals, axis=0)  # how many equal the pivot in the blocks before
            key, weight = _key(x), _weight(x, best, _scale(numbers_ptr, row, rows))
            equal = (key == pivot) & inside
            kept = (key > pivot) | (equal & (rank + tl.cumsum(equal.to(tl.int32), axis=0) <= quota))
            kept = kept & (weight >= _least(numbers_ptr, row, rows))
            temperature = number(numbers_ptr, TEMPERATURE, row, rows).to(tl.float32)
            x = tl.where(kept, tl.div_rn(x - best, temperature), float("-inf"))
    tl.store(out_ptr + row * vocab + i, x, mask=inside)


@triton.jit(do_not_specialize=["k"])
def emit(logits_ptr, cut_ptr, ids_ptr, vocab, stride, k, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per row: the ids of the kept tokens, ascending, int64 [rows, k]."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    pivot, quota = tl.load(cut_ptr + 2 * row).to(tl.int32), tl.load(cut_ptr + 2 * row + 1).to(tl.int32)
    i = tl.arange(0, BLOCK)
    written, rank = 0, 0
    for start in range(0, vocab, BLOCK):
        inside = start + i < vocab
        x = tl.load(logits_ptr + row * stride + start + i, mask=inside, other=float("nan"))
        key = _key(x)
        equal = inside & (key == pivot)
        ranks = rank + tl.cumsum(equal.to(tl.int32), axis=0)
        kept = inside & (x == x) & ((key > pivot) | (equal & (ranks <= quota)))
        place = written + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(ids_ptr + row * k + place, (start + i).to(tl.int64), mask=kept & (place < k))
        written += tl.sum(kept.to(tl.int32), axis=0)
        rank += tl.sum(equal.to(tl.int32), axis=0)
