// Numbers as tensors hold them, and vectors of 16 fp32 values, in which everything is computed.
//
// The vectors are GCC's and Clang's own: the compiler splits them where the CPU has shorter ones.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

constexpr int LANES = 16;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(LANES * 2)));
typedef _Float16 VecHalf __attribute__((vector_size(LANES * 2)));

struct BFloat16 {
    uint16_t bits;
};

// The dtypes of a tensor, as Python numbers them.
enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

template <typename To, typename From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline Vec all(float x) { return x - Vec{}; }

// ---------------------------------------------------------------- one value

inline float wide(float x) { return x; }
inline float wide(BFloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }
inline float wide(_Float16 x) { return float(x); }

template <typename T>
inline T narrow(float x) {
    return T(x);
}

// To the nearest, ties to the even one, as torch rounds; a NaN stays one.
template <>
inline BFloat16 narrow<BFloat16>(float x) {
    uint32_t bits = same_bits<uint32_t>(x);
    if (x != x) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <typename T>
inline float rounded(float x) {
    return wide(narrow<T>(x));
}

// ---------------------------------------------------------------- 16 values

inline Vec load(const float *from) {
    Vec x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

inline Vec load(const BFloat16 *from) {
    HalfBits half;
    std::memcpy(&half, from, sizeof(half));
    return same_bits<Vec>(__builtin_convertvector(half, VecBits) << 16);
}

inline Vec load(const _Float16 *from) {
    VecHalf half;
    std::memcpy(&half, from, sizeof(half));
    return __builtin_convertvector(half, Vec);
}

inline void store(float *to, Vec x) { std::memcpy(to, &x, sizeof(x)); }

inline void store(BFloat16 *to, Vec x) {
    VecBits bits = same_bits<VecBits>(x);
    VecBits near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    VecBits is_nan = same_bits<VecBits>(VecInt(x != x));
    HalfBits half = __builtin_convertvector((near & ~is_nan) | (0x7fc0 & is_nan), HalfBits);
    std::memcpy(to, &half, sizeof(half));
}

inline void store(_Float16 *to, Vec x) {
    VecHalf half = __builtin_convertvector(x, VecHalf);
    std::memcpy(to, &half, sizeof(half));
}

template <typename T>
inline Vec rounded(Vec x) {
    T narrow[LANES];
    store(narrow, x);
    return load(narrow);
}

template <>
inline Vec rounded<float>(Vec x) {
    return x;
}

// By halves: eight sums at once, then four, two and the last.
inline float sum(Vec x) {
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3);
    return x[0] + x[1];
}

// exp(x) to 2 units in the last place: 2^n · e^r with |r| ≤ ln 2 / 2, and the polynomial of Cephes for e^r. What is
// below -87.3 becomes 0 or nearly, what is above 88.7 infinite, a NaN stays one.
inline Vec exponential(Vec x) {
    Vec high = all(88.7228394f), low = all(-87.3365479f);
    Vec inside = x > high ? high : (x < low ? low : x);
    Vec shifter = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    Vec n = (inside * 1.44269504f + shifter) - shifter;
    Vec r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    VecInt whole = __builtin_convertvector(n, VecInt);
    VecInt half = whole >> 1;  // 2^128 is no float, so in two steps
    Vec result = p * same_bits<Vec>((half + 127) << 23) * same_bits<Vec>((whole - half + 127) << 23);
    result = x > high ? all(__builtin_inff()) : result;
    result = x < low ? all(0.0f) : result;
    return x == x ? result : x;
}

// Calls `f` with a value of the type that a dtype stands for.
template <typename F>
inline void with_type(int64_t dtype, F f) {
    switch (dtype) {
        case FLOAT32: return f(float{});
        case BFLOAT16: return f(BFloat16{});
        default: return f(_Float16{});
    }
}

// How many threads a loop takes (`set_num_threads`), and the work (multiplications, or values) from which more than one
// are worth their start.
inline int num_threads = 1;
constexpr int64_t WORTH = 1 << 16;
