// Vectors of fp32 as wide as the processor's registers: reads and writes of both types, sums, and the exponential.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "bfloat16.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
#else
constexpr int W = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
#endif
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));

inline Floats all(float x) { return x - Floats{}; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b where one is not a number

inline Floats load_wide(const float* x) { return load<Floats>(x); }
inline Floats load_wide(const uint16_t* x) { return (Floats)(__builtin_convertvector(load<Halves>(x), Bits) << 16); }

inline void put(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline void put(uint16_t* to, Floats x) {  // to the nearest, ties to even
    Bits bits = (Bits)x;
    Bits nearest = bits + 0x7fff + ((bits >> 16) & 1);
    Halves found = __builtin_convertvector((x == x ? nearest : Bits{} + 0x7fc00000u) >> 16, Halves);
    std::memcpy(to, &found, sizeof found);
}

// The first `count` numbers of a vector, which the memory may end behind; `rest` fills the others.
template <class T>
inline Floats load_part(const T* x, int64_t count, float rest) {
    Floats found = all(rest);
    for (int64_t i = 0; i < count; i++) found[i] = wide(x[i]);
    return found;
}

template <class T>
inline void put_part(T* to, Floats x, int64_t count) {
    for (int64_t i = 0; i < count; i++) narrow(x[i], to + i);
}

// W numbers, or the first `count` of them, the others being zeros.
template <class T>
inline Floats read(const T* x, int64_t count) { return count == W ? load_wide(x) : load_part(x, count, 0.0f); }
template <class T>
inline void write(T* to, Floats x, int64_t count) { count == W ? put(to, x) : put_part(to, x, count); }

typedef std::make_integer_sequence<int, W> Lanes;

template <int... I>
inline Ints numbered(std::integer_sequence<int, I...>) { return Ints{I...}; }

// The numbers INDEX of two vectors, those of the second from W on.
template <int... INDEX, class V>
inline V picked(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, INDEX...);
#else
    return __builtin_shuffle(a, b, Ints{INDEX...});
#endif
}

// Numbers that are STEP apart change places.
template <int STEP, int... I>
inline Floats swapped(Floats x, std::integer_sequence<int, I...>) { return picked<(I ^ STEP)...>(x, x); }

template <int STEP = W / 2>
inline float sum_of(Floats x) {
    if constexpr (STEP == 0)
        return x[0];
    else
        return sum_of<STEP / 2>(x + swapped<STEP>(x, Lanes()));
}

template <int STEP = W / 2>
inline float largest_of(Floats x) {
    if constexpr (STEP == 0)
        return x[0];
    else
        return largest_of<STEP / 2>(larger(x, swapped<STEP>(x, Lanes())));
}

// e^x for x <= 88, relative error below 2e-7; 0 below -87, and not a number where x is none.
inline Floats exponential(Floats x) {
    Floats bounded = larger(all(-87.0f), x);
    Floats shifted = bounded * 1.44269504088896341f + 12582912.0f;  // rounds to an integer in the low bits
    Floats whole = shifted - 12582912.0f;
    Floats rest = bounded - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    Floats y = all(1.9875691500e-4f);
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    Ints power = ((Ints)shifted << 23) + (Ints)y;
    return x < all(-87.0f) ? Floats{} : (Floats)power;
}

// 2^x for x <= 127, relative error below 2e-7; 0 below -126 or somewhat less, and not a number where x is none.
inline Floats power_of_two(Floats x) {
    Floats bounded = larger(all(-160.0f), x);
#if defined(__AVX512F__)
    Floats whole = (Floats)_mm512_roundscale_ps((__m512)bounded, 0);
#else
    Floats shifted = bounded + 12582912.0f;  // rounds to an integer in the low bits
    Floats whole = shifted - 12582912.0f;
#endif
    Floats rest = bounded - whole;
    Floats y = all(1.3264727e-3f);
    y = y * rest + 9.6715130e-3f;
    y = y * rest + 5.5507336e-2f;
    y = y * rest + 2.4022242e-1f;
    y = y * rest + 6.9314700e-1f;
    y = y * rest + 1.0f;
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
    return x < all(-126.0f) ? Floats{} : (Floats)(((Ints)shifted << 23) + (Ints)y);
#endif
}

// tanh(x ln(2) / 2) = (2^x - 1) / (2^x + 1), relative error below 4e-7, and not a number where x is none.
inline Floats tanh_of_powers(Floats x) {
    Floats bounded = x > all(60.0f) ? all(60.0f) : x < all(-60.0f) ? all(-60.0f) : x;
    Floats shifted = bounded + 12582912.0f;  // rounds to an integer in the low bits
    Floats rest = bounded - (shifted - 12582912.0f);
    Floats y = all(1.52527338e-5f);  // (2^rest - 1) / rest by the series of the exponential
    y = y * rest + 1.54035304e-4f;
    y = y * rest + 1.33335581e-3f;
    y = y * rest + 9.61812911e-3f;
    y = y * rest + 5.55041087e-2f;
    y = y * rest + 2.40226507e-1f;
    y = y * rest + 6.93147181e-1f;
    Floats power = (Floats)(((Ints)shifted << 23) + (127 << 23));
    Floats less_one = power * y * rest + (power - 1.0f);
    return less_one / (less_one + 2.0f);
}

}  // namespace
