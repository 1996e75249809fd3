// Products of small blocks: their cells, the tile of results that stays in registers, and the packing of operands.
//
// A cell is one fp32 number or, where the processor multiplies them, a pair of bfloat16 along the dimension that is
// summed. Sums are fp32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 12;  // of a tile: 24 sums of 32 registers
#else
constexpr int ROWS = 6;  // 12 sums of 16 registers
#endif
constexpr int WIDE = 2 * W;  // columns of a tile

#define ALWAYS_INLINE __attribute__((always_inline)) inline

inline Bits load_bits(const uint16_t* x) { return __builtin_convertvector(load<Halves>(x), Bits); }

// Numbers of 32 bits from the start of a cache line on, zeros at first.
template <class T>
class Buffer {
    struct alignas(64) Line {
        T x[16];
    };
    static_assert(sizeof(Line) == 64, "a number has 32 bits");
    std::vector<Line> lines;

public:
    explicit Buffer(int64_t size = 0) : lines((size + 15) / 16) {}
    T* data() { return (T*)lines.data(); }
    const T* data() const { return (const T*)lines.data(); }
    T& operator[](int64_t i) { return data()[i]; }
    const T& operator[](int64_t i) const { return data()[i]; }
    void clear() { std::fill(lines.begin(), lines.end(), Line{}); }
};

// Cells of one fp32 number.
struct Single {
    typedef float Cell;
    static constexpr int PER = 1;
    typedef Floats Cells;
    // W cells of a row from its first number on, and W cells of two rows (here of the first).
    template <class T>
    static Cells along_row(const T* x, bool) { return load_wide(x); }
    template <class T>
    static Cells across_rows(const T* x, const T*) { return load_wide(x); }
    static Cells across_rows(Floats x, Floats) { return x; }
    // The cells along NV vectors of a row.
    template <int NV>
    static void put_along_row(const Floats* x, Cell* to) {
        for (int j = 0; j < NV; j++) put(to + j * W, x[j]);
    }
    static ALWAYS_INLINE void add_product(Floats& sum, Cell left, Cells right) { sum += left * right; }
};

#if defined(__AVX512BF16__)
// Cells of two bfloat16 numbers, the first in the low half.
struct Pair {
    typedef uint32_t Cell;
    static constexpr int PER = 2;
    typedef Bits Cells;
    static Cells along_row(const uint16_t* x, bool half) {  // of the first half of the cells, if a row ends there
        return half ? (Bits)_mm512_zextsi256_si512((__m256i)load<Halves>(x)) : load<Bits>(x);
    }
    static Cells across_rows(const uint16_t* x, const uint16_t* next) { return load_bits(x) | load_bits(next) << 16; }
    static Cells across_rows(Floats x, Floats next) {
        Bits low = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)x), Bits);
        Bits high = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)next), Bits);
        return low | high << 16;
    }
    template <int NV>
    static void put_along_row(const Floats* x, Cell* to) {
        __m512bh found = _mm512_cvtne2ps_pbh(NV > 1 ? (__m512)x[NV - 1] : _mm512_setzero_ps(), (__m512)x[0]);
        std::memcpy(to, &found, sizeof found);
    }
    static ALWAYS_INLINE void add_product(Floats& sum, Cell left, Cells right) {
        sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right);
    }
};
#else
typedef Single Pair;
#endif

// ROWS x (NV * W) results in registers: sum += a b over count cells, one at least, with a[row * ar + k * ak] and b[k * bk + column].
template <class P, int NV>
ALWAYS_INLINE void add_products(Floats (&sum)[ROWS][NV], const typename P::Cell* a, int64_t ar, int64_t ak, const typename P::Cell* b,
                                int64_t bk, int64_t count) {
    if (count < 1) __builtin_unreachable();  // without a way around the loop, sums are never in memory
    for (int64_t k = 0; k < count; k++, a += ak, b += bk) {
        typename P::Cells right[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) right[j] = load<typename P::Cells>(b + j * W);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) P::add_product(sum[i][j], a[i * ar], right[j]);
    }
}

// c [ROWS, NV * W] += a b. A function of its own, as inside others sums leave the registers.
template <class P, int NV, int AR, int AK>
[[gnu::noinline]] void add_to_tile(const typename P::Cell* a, const typename P::Cell* b, int64_t bk, int64_t count, float* c, int64_t cr) {
    Floats sum[ROWS][NV];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = load<Floats>(c + i * cr + j * W);
    add_products<P, NV>(sum, a, AR, AK, b, bk, count);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) put(c + i * cr + j * W, sum[i][j]);
}

// A matrix [length, size], zeros behind its end.
template <class T>
struct Matrix {
    const T* x;
    int64_t stride, length, size;
    const T* row(int64_t i) const { return x + i * stride; }
};

// Of two rows, exchanges the numbers of the first that have STEP in their index with those of the second that have not.
template <int STEP, int... I>
ALWAYS_INLINE void exchange(Bits& a, Bits& b, std::integer_sequence<int, I...>) {
    Bits first = picked<(I & STEP ? W + (I ^ STEP) : I)...>(a, b);
    b = picked<(I & STEP ? W + I : I ^ STEP)...>(a, b);
    a = first;
}

// W rows of W numbers of 32 bits, rows and columns exchanged.
template <int STEP = W / 2>
ALWAYS_INLINE void transpose(Bits (&x)[W]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & STEP)) exchange<STEP>(x[i], x[i ^ STEP], Lanes());
    if constexpr (STEP > 1) transpose<STEP / 2>(x);
}

// Rows [from, from + count) of a matrix turned, times a factor if cells are single: cell k of row i at to[k * count + i].
// Writes of a part of W rows reach behind it, and the next overwrite them: `to` has W cells more.
template <class P, class T>
void pack_turned(const Matrix<T>& m, int64_t from, int64_t count, float factor, typename P::Cell* to) {
    for (int64_t part = 0; part < count; part += W)
        for (int64_t k = 0; k < m.size / P::PER; k += W) {
            int64_t cells = std::min<int64_t>(W, m.size / P::PER - k);
            Bits x[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) {
                bool inside = part + i < count && from + part + i < m.length;
                x[i] = inside ? (Bits)P::along_row(m.row(from + part + i) + k * P::PER, cells < W) : Bits{};
                if (P::PER == 1) x[i] = (Bits)((Floats)x[i] * factor);
            }
            transpose(x);
            for (int64_t j = 0; j < cells; j++) std::memcpy(to + (k + j) * count + part, &x[j], sizeof(Bits));
        }
}

// Cells along the rows: [count / PER, size].
template <class P, class T>
void pack_columns(const Matrix<T>& m, int64_t from, int64_t count, typename P::Cell* to) {
    const T zeros[W] = {};
    for (int64_t i = from; i < from + count; i += P::PER)
        for (int64_t j = 0; j < m.size; j += W, to += W) {
            typename P::Cells found{};
            if (i < m.length) found = P::across_rows(m.row(i) + j, i + P::PER <= m.length ? m.row(i + P::PER - 1) + j : zeros);
            std::memcpy(to, &found, sizeof found);
        }
}

}  // namespace
