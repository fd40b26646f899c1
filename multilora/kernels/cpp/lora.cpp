// What the adapters of a step add to the outputs of one linear layer; called by `lora/cpp_backend.py`.

#include "products.h"

#include <algorithm>
#include <vector>

namespace {

// A matrix [rows, cols] of an adapter, or a part of one, from (row, col) on: `Piece` of `lora/table.py`. It begins
// `offset` bytes into the arena.
struct Part {
    int64_t row, col, rows, cols, offset;
};

// fp32 [2, cols], for the outputs from `col` on.
struct ScaleShift {
    int64_t col, cols, offset;
};

// One adapter at one site. Behind it lie its parts of A, then those of B, whose row is the one in the intermediate
// and whose col is an output, then its pairs.
struct Site {
    int64_t rank, num_a, num_b, num_pairs;

    const Part *a() const { return reinterpret_cast<const Part *>(this + 1); }
    const Part *b() const { return a() + num_a; }
    const ScaleShift *pairs() const { return reinterpret_cast<const ScaleShift *>(b() + num_b); }
};

// Rows [start, end) and one adapter that acts on them. sites: where it does something, else null. The adapters of
// one segment follow each other. first: whether it is the first of its segment.
struct Acting {
    int64_t start, end;
    const Site *const *sites;
    double weight;
    int64_t first;
};

struct Job {
    const Site *site;
    const char *arena;
    int64_t start, rows;
    float weight;
    int64_t x;  // where its rows [rows, in] begin in fp32
    int64_t h;  // where its intermediate [rows, rank] begins
};

constexpr int ROWS = 4;       // of x or y at once
constexpr int RANKS = 4;      // rows of A at once
constexpr int BLOCK = 4 * LANES;  // outputs at once
constexpr int GRANULE = 8;    // rows of A that one thread takes

template <int M, typename W>
inline void shrink_rows(const Job &job, const Part &part, int64_t from, int64_t to, const float *x, int64_t in, float *h) {
    const W *a = reinterpret_cast<const W *>(job.arena + part.offset) + (from - part.row) * part.cols;
    int64_t rank = job.site->rank;
    for (int64_t r = from; r < to; r += RANKS, a += RANKS * part.cols)  // `rank` is a multiple of 8
        add_products<M, RANKS>(x + part.col, in, a, part.cols, h + r, rank);
}

// Rows [first, first + GRANULE) of A times all of the job's rows.
template <typename W>
void shrink(const Job &job, int64_t first, const float *x, int64_t in, float *h) {
    h += job.h;
    x += job.x;
    int64_t rank = job.site->rank;
    for (int64_t m = 0; m < job.rows; m++) std::fill_n(h + m * rank + first, GRANULE, 0.0f);
    for (int64_t p = 0; p < job.site->num_a; p++) {
        const Part &part = job.site->a()[p];
        int64_t from = std::max(first, part.row), to = std::min(first + GRANULE, part.row + part.rows);
        if (from >= to) continue;
        int64_t m = 0;
        for (; m + ROWS <= job.rows; m += ROWS) shrink_rows<ROWS, W>(job, part, from, to, x + m * in, in, h + m * rank);
        for (; m < job.rows; m++) shrink_rows<1, W>(job, part, from, to, x + m * in, in, h + m * rank);
    }
}

// total[m][0 … BLOCK) += weight · h[m] · b, of BLOCK columns of a part of B, the first of which begin at `b`.
template <int M, typename W>
inline void add_block(const Part &part, const W *b, const float *h, int64_t rank, float weight, float *total) {
    Vec sums[M][BLOCK / LANES];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < BLOCK / LANES; v++) sums[m][v] = load(total + m * BLOCK + v * LANES);
    for (int64_t r = 0; r < part.rows; r++, b += part.cols) {
        Vec weights[BLOCK / LANES];
        for (int v = 0; v < BLOCK / LANES; v++) weights[v] = load(b + v * LANES);
        for (int m = 0; m < M; m++) {
            float factor = weight * h[m * rank + part.row + r];
            for (int v = 0; v < BLOCK / LANES; v++) sums[m][v] += factor * weights[v];
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < BLOCK / LANES; v++) store(total + m * BLOCK + v * LANES, sums[m][v]);
}

// The same for one row and `count` columns.
template <typename W>
inline void add_some(const Part &part, const W *b, int64_t count, const float *h, float weight, float *total) {
    for (int64_t r = 0; r < part.rows; r++, b += part.cols) {
        float factor = weight * h[part.row + r];
        for (int64_t c = 0; c < count; c++) total[c] += factor * wide(b[c]);
    }
}

template <int M, typename W, typename Y>
inline void expand_rows(const Job *jobs, int64_t num_jobs, int64_t m, int64_t block, int64_t end, Y *y, int64_t out, const float *h) {
    float total[M * BLOCK];
    y += (jobs->start + m) * out + block;
    for (int i = 0; i < M; i++)
        for (int64_t c = 0; c < end - block; c++) total[i * BLOCK + c] = wide(y[i * out + c]);
    for (const Job *job = jobs; job < jobs + num_jobs; job++) {
        int64_t rank = job->site->rank;
        const float *own = h + job->h + m * rank;
        for (int64_t p = 0; p < job->site->num_b; p++) {
            const Part &part = job->site->b()[p];
            int64_t from = std::max(block, part.col), to = std::min(end, part.col + part.cols);
            if (from >= to) continue;
            const W *b = reinterpret_cast<const W *>(job->arena + part.offset) + (from - part.col);
            if (to - from == BLOCK)
                add_block<M, W>(part, b, own, rank, job->weight, total);
            else
                for (int i = 0; i < M; i++)
                    add_some<W>(part, b, to - from, own + i * rank, job->weight, total + i * BLOCK + from - block);
        }
        for (int64_t p = 0; p < job->site->num_pairs; p++) {
            const ScaleShift &pair = job->site->pairs()[p];
            const float *scale = reinterpret_cast<const float *>(job->arena + pair.offset), *shift = scale + pair.cols;
            int64_t from = std::max(block, pair.col), to = std::min(end, pair.col + pair.cols);
            for (int i = 0; i < M; i++)
                for (int64_t c = from; c < to; c++) {
                    float &value = total[i * BLOCK + c - block];
                    value = rounded<Y>(value) * scale[c - pair.col] + shift[c - pair.col];
                }
        }
    }
    for (int i = 0; i < M; i++)
        for (int64_t c = 0; c < end - block; c++) y[i * out + c] = narrow<Y>(total[i * BLOCK + c]);
}

// Outputs [block, block + BLOCK) of the rows of one segment, with all of its jobs.
template <typename W, typename Y>
void expand(const Job *jobs, int64_t num_jobs, int64_t block, Y *y, int64_t out, const float *h) {
    int64_t end = std::min(block + BLOCK, out), m = 0;
    for (; m + ROWS <= jobs->rows; m += ROWS) expand_rows<ROWS, W>(jobs, num_jobs, m, block, end, y, out, h);
    for (; m < jobs->rows; m++) expand_rows<1, W>(jobs, num_jobs, m, block, end, y, out, h);
}

struct Segment {
    int64_t first, count;  // of the jobs
};

}  // namespace

// arena: where all weights lie, in `weight_dtype`. y[rows] += weight · round(x[rows] Aᵀ) B for each of the `num` adapters, then their pairs of scale and shift.
// x: [rows, in], y: [rows, out], contiguous. Nothing is rounded between the adapters of one segment.
extern "C" void add_lora(const void *arena, const Acting *acting, int64_t num, int64_t site, const void *x, int64_t x_dtype,
                         int64_t in, void *y, int64_t y_dtype, int64_t out, int64_t weight_dtype) {
    std::vector<Job> jobs;
    std::vector<Segment> segments;
    std::vector<std::pair<int64_t, int64_t>> granules;  // job, first row of A
    int64_t h_size = 0, x_size = 0, work = 0;
    bool fresh = true;
    for (const Acting *one = acting; one < acting + num; one++) {
        fresh |= bool(one->first);
        const Site *found = one->sites[site];
        if (found == nullptr) continue;
        int64_t rows = one->end - one->start;
        if (fresh) {
            segments.push_back({int64_t(jobs.size()), 0});
            x_size += rows * in;
        }
        fresh = false;
        segments.back().count++;
        for (int64_t r = 0; r < found->rank; r += GRANULE) granules.push_back({int64_t(jobs.size()), r});
        jobs.push_back({found, static_cast<const char *>(arena), one->start, rows, float(one->weight),
                        x_dtype == FLOAT32 ? one->start * in : x_size - rows * in, h_size});
        h_size += rows * found->rank;
        work += rows * found->rank * (in + out);
    }
    if (jobs.empty()) return;
    static thread_local std::vector<float> h, wide_x;
    h.resize(h_size);
    float *h_data = h.data();
    const float *x_data = static_cast<const float *>(x);
    int64_t num_granules = granules.size(), num_blocks = (out + BLOCK - 1) / BLOCK;
    int64_t num_expands = segments.size() * num_blocks;
    if (x_dtype != FLOAT32) {
        wide_x.resize(x_size);
        with_type(x_dtype, [&](auto type) {
            for (const Segment &segment : segments) {
                const Job &job = jobs[segment.first];
                auto *from = static_cast<const decltype(type) *>(x) + job.start * in;
                for (int64_t i = 0; i < job.rows * in; i++) wide_x[job.x + i] = wide(from[i]);
            }
        });
        x_data = wide_x.data();
    }
    with_type(weight_dtype, [&](auto weight) {
        using W = decltype(weight);
#pragma omp parallel num_threads(num_threads) if (work >= WORTH)
        {
#pragma omp for schedule(static)
            for (int64_t g = 0; g < num_granules; g++) {
                const Job &job = jobs[granules[g].first];
                shrink<W>(job, granules[g].second, x_data, in, h_data);
                with_type(x_dtype, [&](auto type) {
                    for (int64_t m = 0; m < job.rows; m++) {
                        float *own = h_data + job.h + m * job.site->rank + granules[g].second;
                        for (int r = 0; r < GRANULE; r++) own[r] = rounded<decltype(type)>(own[r]);
                    }
                });
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < num_expands; i++) {
                const Segment &segment = segments[i / num_blocks];
                with_type(y_dtype, [&](auto type) {
                    using Y = decltype(type);
                    expand<W, Y>(&jobs[segment.first], segment.count, i % num_blocks * BLOCK, static_cast<Y *>(y), out, h_data);
                });
            }
        }
    });
}
