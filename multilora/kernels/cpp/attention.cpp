// Rotation, the writing of pages, and attention of one new token a request; called by `attention/cpp_attention.py`.

#include "numbers.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

// Rotates the pairs (x[i], x[i + half]) by angles of these cos and sin.
template <typename T>
void rotate(const T *x, const float *cos, const float *sin, int64_t half, T *y) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        Vec first = load(x + i), second = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(y + i, first * c - second * s);
        store(y + half + i, second * c + first * s);
    }
    for (; i < half; i++) {
        float first = wide(x[i]), second = wide(x[half + i]);
        y[i] = narrow<T>(first * cos[i] - second * sin[i]);
        y[half + i] = narrow<T>(second * cos[i] + first * sin[i]);
    }
}

template <typename T>
float dot(const float *q, const T *k, int64_t size) {
    Vec sums = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sums += load(q + i) * load(k + i);
    float total = sum(sums);
    for (; i < size; i++) total += q[i] * wide(k[i]);
    return total;
}

template <typename T>
void add_scaled(float *y, const T *v, float weight, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(y + i, load(y + i) + weight * load(v + i));
    for (; i < size; i++) y[i] += weight * wide(v[i]);
}

// scores → exp(scores - max), in place; returns their sum, `sink` included.
float softmax(float *scores, int64_t count, const float *sink) {
    float largest = sink != nullptr ? *sink : -INFINITY;
    for (int64_t i = 0; i < count; i++) largest = std::max(largest, scores[i]);
    float total = sink != nullptr ? std::exp(*sink - largest) : 0.0f;
    int64_t i = 0;
    Vec sums = {};
    for (; i + LANES <= count; i += LANES) {
        Vec weights = exponential(load(scores + i) - largest);
        store(scores + i, weights);
        sums += weights;
    }
    for (; i < count; i++) total += scores[i] = std::exp(scores[i] - largest);
    return total + sum(sums);
}

}  // namespace

// Keys or values of a layer: token t of page p begins at data + p · page_stride + t · token_stride, its heads follow
// each other.
struct Pages {
    void *data;
    int64_t page_stride, token_stride;
};

// What all layers of a model have in common.
struct Heads {
    int64_t heads, kv_heads, head_dim, page_size, dtype;
    double scale, softcap;  // softcap 0: none
};

// Rotates the queries and keys of `tokens` new tokens, and writes keys and values into their pages.
// q, k, v: token t begins at data + t · stride; cos, sin: fp32 [tokens, head_dim / 2]; q_out, k_out: contiguous.
extern "C" void rotate_and_store(const Heads *shape, int64_t tokens, const void *q, int64_t q_stride, const void *k, int64_t k_stride,
                                 const void *v, int64_t v_stride, const float *cos, const float *sin, void *q_out,
                                 void *k_out, const Pages *k_pages, const Pages *v_pages, const int64_t *token_page,
                                 const int64_t *token_slot) {
    with_type(shape->dtype, [&](auto type) {
        using T = decltype(type);
        int64_t dim = shape->head_dim, half = dim / 2, kv = shape->kv_heads * dim;
#pragma omp parallel for num_threads(num_threads) if (tokens * (shape->heads * dim + kv) >= WORTH)
        for (int64_t t = 0; t < tokens; t++) {
            const float *c = cos + t * half, *s = sin + t * half;
            T *own_q = static_cast<T *>(q_out) + t * shape->heads * dim, *own_k = static_cast<T *>(k_out) + t * kv;
            for (int64_t h = 0; h < shape->heads; h++)
                rotate(static_cast<const T *>(q) + t * q_stride + h * dim, c, s, half, own_q + h * dim);
            for (int64_t h = 0; h < shape->kv_heads; h++)
                rotate(static_cast<const T *>(k) + t * k_stride + h * dim, c, s, half, own_k + h * dim);
            for (auto [pages, from] : {std::pair(k_pages, static_cast<const T *>(own_k)),
                                       std::pair(v_pages, static_cast<const T *>(v) + t * v_stride)})
                std::copy_n(from, kv, static_cast<T *>(pages->data) + token_page[t] * pages->page_stride +
                                          token_slot[t] * pages->token_stride);
        }
    });
}

// Attention of one new token for each of `num` requests, over tokens [first, kv_len) of each.
// q: rotated, [tokens, heads, head_dim]; rows: which row of q and y each request has; tables: which row of
// page_table [·, table_width]; sinks: fp32 [heads] or null; y: as q.
extern "C" void decode(const Heads *shape, int64_t num, const void *q, const int64_t *rows, const int64_t *tables,
                       const int64_t *first, const int64_t *kv_lens, const int64_t *page_table, int64_t table_width,
                       const Pages *k_pages, const Pages *v_pages, const float *sinks, void *y) {
    int64_t dim = shape->head_dim, group = shape->heads / shape->kv_heads, work = 0;
    for (int64_t r = 0; r < num; r++) work += (kv_lens[r] - first[r]) * shape->heads * dim;
    // Of a token all heads lie side by side, so one thread reads them all if there are requests for all threads.
    int64_t parts = num >= 2 * num_threads ? 1 : shape->kv_heads, kv_heads = shape->kv_heads / parts;
    with_type(shape->dtype, [&](auto type) {
        using T = decltype(type);
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) if (work >= WORTH)
        for (int64_t item = 0; item < num * parts; item++) {
            int64_t r = item / parts, head = item % parts * kv_heads, heads = kv_heads * group;
            int64_t count = kv_lens[r] - first[r];
            const int64_t *table = page_table + tables[r] * table_width;
            auto token = [&](const Pages *pages, int64_t t) {
                return static_cast<const T *>(pages->data) + table[t / shape->page_size] * pages->page_stride +
                       t % shape->page_size * pages->token_stride + head * dim;
            };
            static thread_local std::vector<float> room;
            room.resize(heads * (count + 2 * dim + 1));
            float *scores = room.data(), *queries = scores + heads * count, *outputs = queries + heads * dim;
            float *totals = outputs + heads * dim;
            int64_t at = (rows[r] * shape->heads + head * group) * dim;
            for (int64_t i = 0; i < heads * dim; i++) queries[i] = wide(static_cast<const T *>(q)[at + i]);
            std::fill_n(outputs, heads * dim, 0.0f);
            for (int64_t t = 0; t < count; t++) {
                const T *key = token(k_pages, first[r] + t);
                for (int64_t h = 0; h < heads; h++) {
                    float score = dot(queries + h * dim, key + h / group * dim, dim) * float(shape->scale);
                    if (shape->softcap != 0) score = std::tanh(score / float(shape->softcap)) * float(shape->softcap);
                    scores[h * count + t] = score;
                }
            }
            for (int64_t h = 0; h < heads; h++)
                totals[h] = softmax(scores + h * count, count, sinks == nullptr ? nullptr : sinks + head * group + h);
            for (int64_t t = 0; t < count; t++) {
                const T *value = token(v_pages, first[r] + t);
                for (int64_t h = 0; h < heads; h++)
                    add_scaled(outputs + h * dim, value + h / group * dim, scores[h * count + t], dim);
            }
            for (int64_t h = 0; h < heads; h++)
                for (int64_t i = 0; i < dim; i++)
                    static_cast<T *>(y)[at + h * dim + i] = narrow<T>(outputs[h * dim + i] / totals[h]);
        }
    });
}
