// The small operations between two products of a layer; called by `layers/cpp_ops.py`.

#include "numbers.h"

#include <cmath>

namespace {

enum Form : int64_t { ROUNDED = 0, WIDE = 1, ONE_PLUS = 2 };  // `NormForm` of `layers/norm.py`

template <typename T>
void norm_row(const T *x, const T *residual, const T *weight, float eps, int64_t form, int64_t size, T *y, T *total) {
    Vec squares = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        Vec value = load(x + i);
        if (residual != nullptr) {
            value = rounded<T>(value + load(residual + i));
            store(total + i, value);
        }
        squares += value * value;
    }
    for (; i < size; i++) {
        float value = wide(x[i]);
        if (residual != nullptr) {
            total[i] = narrow<T>(value + wide(residual[i]));
            value = wide(total[i]);
        }
        rest += value * value;
    }
    float factor = 1.0f / std::sqrt((sum(squares) + rest) / float(size) + eps);
    const T *from = residual != nullptr ? total : x;
    Vec one = all(form == ONE_PLUS ? 1.0f : 0.0f);
    for (i = 0; i + LANES <= size; i += LANES) {
        Vec normed = load(from + i) * factor;
        if (form == ROUNDED) normed = rounded<T>(normed);
        store(y + i, (load(weight + i) + one) * normed);
    }
    for (; i < size; i++) {
        float normed = wide(from[i]) * factor;
        if (form == ROUNDED) normed = rounded<T>(normed);
        y[i] = narrow<T>((wide(weight[i]) + one[0]) * normed);
    }
}

template <typename T>
void activate_row(const T *gate, const T *up, int64_t width, T *y) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        Vec value = load(gate + i);
        store(y + i, rounded<T>(value / (1.0f + exponential(-value))) * load(up + i));
    }
    for (; i < width; i++) {
        float value = wide(gate[i]);
        y[i] = narrow<T>(rounded<T>(value / (1.0f + std::exp(-value))) * wide(up[i]));
    }
}

}  // namespace

// y = norm(x) for rows of rows: x[i][j] begins at x + i · outer + j · inner. residual not null: total = x + residual,
// y = norm(total), and all lie contiguous. y: contiguous.
extern "C" void rms_norm(const void *x, int64_t outer, int64_t num_outer, int64_t inner, int64_t num_inner, int64_t size,
                         const void *residual, const void *weight, double eps, int64_t form, void *y, void *total,
                         int64_t dtype) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        int64_t rows = num_outer * num_inner;
#pragma omp parallel for num_threads(num_threads) if (rows * size >= WORTH)
        for (int64_t row = 0; row < rows; row++) {
            int64_t at = row * size;
            norm_row<T>(static_cast<const T *>(x) + row / num_inner * outer + row % num_inner * inner,
                        residual == nullptr ? nullptr : static_cast<const T *>(residual) + at, static_cast<const T *>(weight),
                        float(eps), form, size, static_cast<T *>(y) + at, static_cast<T *>(total) + at);
        }
    });
}

// y = silu(gate) · up. gate_up: [rows, 2 · width], gate first; y: [rows, width].
extern "C" void silu_and_mul(const void *gate_up, int64_t rows, int64_t width, void *y, int64_t dtype) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        auto *from = static_cast<const T *>(gate_up);
#pragma omp parallel for num_threads(num_threads) if (rows * width * 8 >= WORTH)
        for (int64_t row = 0; row < rows; row++)
            activate_row<T>(from + row * 2 * width, from + (row * 2 + 1) * width, width, static_cast<T *>(y) + row * width);
    });
}
