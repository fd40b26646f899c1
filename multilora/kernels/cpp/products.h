// A tile of x Wᵀ, whose sums stay in registers.

#pragma once

#include "numbers.h"

// y[m][r] += Σ x[m][i] · weight[r][i] over `in` inputs, for M rows of x and R rows of the weight. Rows of x begin `x_stride`
// values apart, those of the weight `in`, those of y `y_stride`. The order of a sum depends on `in` alone.
template <int M, int R, typename W>
inline void add_products(const float *x, int64_t x_stride, const W *weight, int64_t in, float *y, int64_t y_stride) {
    Vec sums[M][R] = {};
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        Vec rows[M];
        for (int m = 0; m < M; m++) rows[m] = load(x + m * x_stride + i);
        for (int r = 0; r < R; r++) {
            Vec own = load(weight + r * in + i);
            for (int m = 0; m < M; m++) sums[m][r] += rows[m] * own;
        }
    }
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) {
            float rest = 0;
            for (int64_t j = i; j < in; j++) rest += x[m * x_stride + j] * wide(weight[r * in + j]);
            y[m * y_stride + r] += sum(sums[m][r]) + rest;
        }
}
