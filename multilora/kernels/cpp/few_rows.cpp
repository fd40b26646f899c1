// x Wᵀ in fp32 for the few rows of a decode step; called by `layers/cpp_ops.py`.
//
// BLAS libraries are made for many rows: with up to 32 they read W from memory at half the speed that it can be read at,
// or less.

#include "products.h"

#include <algorithm>

namespace {

constexpr int ROWS = 4;     // of x at once
constexpr int OUTPUTS = 6;  // rows of W at once: 24 sums, and 10 values that they are made of, are in registers

template <int R>
void outputs(const float *x, int64_t rows, const float *weight, int64_t in, float *y, int64_t out) {
    int64_t m = 0;
    for (; m + ROWS <= rows; m += ROWS) add_products<ROWS, R>(x + m * in, in, weight, in, y + m * out, out);
    for (; m < rows; m++) add_products<1, R>(x + m * in, in, weight, in, y + m * out, out);
}

}  // namespace

// y = x Wᵀ + bias. x: [rows, in], weight: [out, in], y: [rows, out], all contiguous; bias: [out] or null.
extern "C" void few_rows(const float *x, int64_t rows, int64_t in, const float *weight, const float *bias, int64_t out, float *y) {
    int64_t blocks = (out + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (rows * in * out >= WORTH)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = block * OUTPUTS, end = std::min(first + OUTPUTS, out);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t r = first; r < end; r++) y[m * out + r] = bias == nullptr ? 0.0f : bias[r];
        if (end - first == OUTPUTS)
            outputs<OUTPUTS>(x, rows, weight + first * in, in, y + first, out);
        else
            for (int64_t r = first; r < end; r++) outputs<1>(x, rows, weight + r * in, in, y + r, out);
    }
}
