// The product of a few rows with a bfloat16 matrix, on a processor without instructions for bfloat16: the matrix is read
// once, as it is, so a step of decoding costs what reading half of an fp32 matrix costs. Sums are fp32, and a result is
// rounded once. Python's side, shapes and checks: ../packed_linear.py.
//
// A word of 32 bits holds two neighbours of a row; shifted or masked, each is a float. So rows of x are laid out likewise
// first: of every 16 elements the even ones, then the odd ones.

#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"

namespace {

constexpr int W = 8;  // floats of a vector
constexpr int STEP = 2 * W;
typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));

struct Sizes {
    int64_t rows, out, in;
};

// R rows of x times C rows of the matrix.
template <int R, int C>
void tile(const float* x, const uint16_t* w, const uint16_t* bias, uint16_t* y, const Sizes& s) {
    Floats sums[R][C] = {};
    for (int64_t at = 0; at < s.in; at += STEP) {
        Floats even[C], odd[C];
        for (int c = 0; c < C; c++) {
            const Words both = load<Words>(w + c * s.in + at);
            even[c] = (Floats)(both << 16);
            odd[c] = (Floats)(both & 0xffff0000u);
        }
        for (int r = 0; r < R; r++) {
            const Floats first = load<Floats>(x + r * s.in + at), second = load<Floats>(x + r * s.in + at + W);
            for (int c = 0; c < C; c++) {
                sums[r][c] += first * even[c];
                sums[r][c] += second * odd[c];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            float total = bias ? wide(bias[c]) : 0.0f;
            for (int lane = 0; lane < W; lane++) total += sums[r][c][lane];
            y[r * s.out + c] = rounded(total);
        }
}

// All rows of x times C rows of the matrix, which stay in the cache meanwhile. Four rows of x go with two of the matrix at
// once: more sums would not fit into the sixteen registers that every processor of this kind has.
template <int C>
void columns(const float* x, const uint16_t* w, const uint16_t* bias, uint16_t* y, const Sizes& s) {
    constexpr int PART = C < 2 ? C : 2;
    int64_t row = 0;
    for (; row + 4 <= s.rows; row += 4)
        for (int c = 0; c < C; c += PART)
            tile<4, PART>(x + row * s.in, w + c * s.in, bias ? bias + c : bias, y + row * s.out + c, s);
    for (; row < s.rows; row++) tile<1, C>(x + row * s.in, w, bias, y + row * s.out, s);
}

}  // namespace

extern "C" {

// y [rows, out] = x [rows, in] times w [out, in] turned, plus bias [out] or nothing; all bfloat16 and contiguous, in a
// multiple of 16. sizes: rows, out, in.
void neox_few_rows(const uint16_t* x, const uint16_t* w, const uint16_t* bias, uint16_t* y, const int64_t* sizes,
                   int threads) {
    Sizes s;
    std::memcpy(&s, sizes, sizeof(s));
    std::vector<float> turned(s.rows * s.in);
    for (int64_t at = 0; at < s.rows * s.in; at += STEP)
        for (int i = 0; i < W; i++) {
            turned[at + i] = wide(x[at + 2 * i]);
            turned[at + W + i] = wide(x[at + 2 * i + 1]);
        }
    const int64_t fours = s.out / 4;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t four = 0; four < fours; four++)
        columns<4>(turned.data(), w + 4 * four * s.in, bias ? bias + 4 * four : bias, y + 4 * four, s);
    for (int64_t left = 4 * fours; left < s.out; left++)
        columns<1>(turned.data(), w + left * s.in, bias ? bias + left : bias, y + left, s);
}
}
