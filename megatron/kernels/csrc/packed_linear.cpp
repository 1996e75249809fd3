// The product of rows with a packed fp32 matrix: for a few rows the matrix is read once, at the speed of the memory.
//
// The matrix [out, in] is packed in panels of W of its rows, [out / W][in][W], zeros behind its end, so that W results of
// a row are a sum of vectors, and nothing is added across a vector. Python's side, shapes and checks: ../packed_linear.py.

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int MOST = 12;   // rows that are multiplied with one panel, each with a sum in a register
constexpr int PAIRED = 6;  // rows that are multiplied with two panels
constexpr int64_t AHEAD = 2048;  // numbers of the matrix that are fetched before they are needed

struct Sizes {
    int64_t rows, out, in;
    int64_t panels() const { return (out + W - 1) / W; }
};

struct Operands {
    const float *x, *w, *bias;
    float* y;
    Sizes s;
};

// R rows from `row` on times C panels from `panel` on.
template <int R, int C>
[[gnu::noinline]] void tile(const Operands& o, int64_t row, int64_t panel) {
    const int64_t in = o.s.in;
    const float *x = o.x + row * in, *w = o.w + panel * in * W;
    Floats sums[R][C];
    for (int c = 0; c < C; c++) {
        const int64_t first = (panel + c) * W;
        const Floats start = o.bias ? read(o.bias + first, std::min<int64_t>(W, o.s.out - first)) : Floats{};
        for (int r = 0; r < R; r++) sums[r][c] = start;
    }
    for (int64_t k = 0; k < in; k++, w += W) {
        Floats right[C];
        for (int c = 0; c < C; c++) right[c] = load<Floats>(w + c * in * W);
        if (C == 1) __builtin_prefetch(w + AHEAD);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int c = 0; c < C; c++) sums[r][c] += x[r * in + k] * right[c];
    }
    for (int c = 0; c < C; c++) {
        const int64_t first = (panel + c) * W;
        for (int r = 0; r < R; r++) write(o.y + (row + r) * o.s.out + first, sums[r][c], std::min<int64_t>(W, o.s.out - first));
    }
}

// Up to R rows.
template <int R, int C>
void tiles(const Operands& o, int64_t row, int64_t count, int64_t panel) {
    if constexpr (R > 1)
        if (count < R) return tiles<R - 1, C>(o, row, count, panel);
    tile<R, C>(o, row, panel);
}

template <int R, int C>
void all_rows(const Operands& o, int64_t panel) {
    const int64_t parts = (o.s.rows + R - 1) / R, each = (o.s.rows + parts - 1) / parts;
    for (int64_t row = 0; row < o.s.rows; row += each) tiles<R, C>(o, row, std::min(each, o.s.rows - row), panel);
}

}  // namespace

extern "C" {

// How many numbers the packed form of a matrix has. sizes: rows (any), out, in.
int64_t neox_packed_size(const int64_t* sizes) {
    Sizes s;
    std::memcpy(&s, sizes, sizeof(s));
    return s.panels() * s.in * W;
}

// Packs w [out, in]. sizes: rows (any), out, in.
void neox_pack(const float* w, float* to, const int64_t* sizes) {
    Sizes s;
    std::memcpy(&s, sizes, sizeof(s));
    for (int64_t first = 0; first < s.out; first += W)
        for (int64_t k = 0; k < s.in; k++, to += W)
            for (int at = 0; at < W; at++) to[at] = first + at < s.out ? w[(first + at) * s.in + k] : 0.0f;
}

// y [rows, out] = x [rows, in] times the packed w turned, plus bias [out] or nothing. sizes: rows, out, in.
void neox_packed_product(const float* x, const float* w, const float* bias, float* y, const int64_t* sizes, int threads) {
    Operands o{x, w, bias, y, {}};
    std::memcpy(&o.s, sizes, sizeof(o.s));
    if (o.s.rows == 0) return;
    const int64_t panels = o.s.panels(), width = o.s.rows > MOST ? 2 : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel += width)
        if (width == 2 && panel + 1 < panels)
            all_rows<PAIRED, 2>(o, panel);
        else
            all_rows<MOST, 1>(o, panel);
}
}
