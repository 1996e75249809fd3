// The gradient of a linear layer's weight: c [m, n] (+)= aᵀ b, of a [rows, m] and b [rows, n], with fp32 sums.
//
// Both operands are read along their rows, so neither is transposed in memory: a block of rows is copied into panels
// that the small product reads in order, and each panel is used many times. Cells are one fp32 number, or, where the
// processor multiplies them, a pair of bfloat16 of two neighbouring rows.
// Python's side, shapes and checks: ../cpp_weight_gradient.py.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 8;  // 16 sums of 32 registers
constexpr int64_t DEPTH = 1024;  // rows of a and b in a block
#else
constexpr int ROWS = 6;  // 12 sums of 16 registers: fewer wait for each other
constexpr int64_t DEPTH = 256;
#endif
constexpr int COLUMNS = 2 * W;  // of a small product, in registers

struct Single {
    typedef float Cell;
    static constexpr int PER = 1;
    static void add_product(Floats& sum, Cell left, const Cell* right) { sum += left * load<Floats>(right); }
    static Cell join(float first, float) { return first; }
    static Cell join(uint16_t first, uint16_t) { return wide(first); }
};

#if defined(__AVX512BF16__)
struct Pair {
    typedef uint32_t Cell;
    static constexpr int PER = 2;
    static void add_product(Floats& sum, Cell left, const Cell* right) {
        sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)_mm512_loadu_si512(right));
    }
    static Cell join(uint16_t first, uint16_t second) { return Cell(first) | Cell(second) << 16; }
};
#else
typedef Single Pair;
#endif

// Some columns of a block of rows as a panel: [rows / PER][WIDTH] cells, zeros behind the end of both.
template <class P, int WIDTH, class T>
void pack(const T* x, int64_t stride, int64_t rows, int64_t columns, typename P::Cell* to) {
    for (int64_t i = 0; i < rows; i += P::PER, x += P::PER * stride, to += WIDTH)
        if (columns == WIDTH && i + P::PER <= rows)
            for (int at = 0; at < WIDTH; at++) to[at] = P::join(x[at], x[at + (P::PER - 1) * stride]);
        else
            for (int at = 0; at < WIDTH; at++) {
                const T nothing = 0, &first = at < columns ? x[at] : nothing;
                to[at] = P::join(first, at < columns && i + P::PER <= rows ? x[at + (P::PER - 1) * stride] : nothing);
            }
}

// One ROWS x COLUMNS result of two panels.
template <class P>
inline void small_product(const typename P::Cell* a, const typename P::Cell* b, int64_t cells, Floats sum[ROWS][2]) {
    for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = Floats{};
    for (int64_t k = 0; k < cells; k++, a += ROWS, b += COLUMNS)
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            P::add_product(sum[i][0], a[i], b);
            P::add_product(sum[i][1], a[i], b + W);
        }
}

inline void put_sums(const Floats sum[ROWS][2], float* c, int64_t stride, int64_t rows, int64_t columns, bool add) {
    for (int64_t i = 0; i < rows; i++, c += stride)
        for (int j = 0; j < 2; j++) {
            int64_t count = std::clamp<int64_t>(columns - j * W, 0, W);
            float* to = c + j * W;
            if (count == W)
                put(to, add ? load<Floats>(to) + sum[i][j] : sum[i][j]);
            else
                for (int64_t at = 0; at < count; at++) to[at] = add ? to[at] + sum[i][j][at] : sum[i][j][at];
        }
}

// n: rows, m, n; s: strides of a, b and c.
template <class P, class T>
void gradient(const T* a, const T* b, float* c, const int64_t* n, const int64_t* s, bool add, int threads) {
    typedef typename P::Cell Cell;
    int64_t rows = n[0], left = (n[1] + ROWS - 1) / ROWS, right = (n[2] + COLUMNS - 1) / COLUMNS, depth = DEPTH / P::PER;
    std::unique_ptr<Cell[]> columns(new Cell[right * depth * COLUMNS]);  // not filled with zeros, as a vector is
#pragma omp parallel num_threads(threads)
    {
        std::vector<Cell> panel(depth * ROWS);
        Floats sum[ROWS][2];
        for (int64_t row = 0; row < rows; row += DEPTH) {
            int64_t count = std::min(DEPTH, rows - row), cells = (count + P::PER - 1) / P::PER;
#pragma omp for schedule(static)
            for (int64_t j = 0; j < right; j++)
                pack<P, COLUMNS>(b + row * s[1] + j * COLUMNS, s[1], count, std::min<int64_t>(COLUMNS, n[2] - j * COLUMNS),
                                 &columns[j * depth * COLUMNS]);
#pragma omp for schedule(dynamic, 2)
            for (int64_t i = 0; i < left; i++) {
                int64_t height = std::min<int64_t>(ROWS, n[1] - i * ROWS);
                pack<P, ROWS>(a + row * s[0] + i * ROWS, s[0], count, height, panel.data());
                for (int64_t j = 0; j < right; j++) {
                    small_product<P>(panel.data(), &columns[j * depth * COLUMNS], cells, sum);
                    put_sums(sum, c + i * ROWS * s[2] + j * COLUMNS, s[2], height, n[2] - j * COLUMNS, add || row);
                }
            }
        }
    }
}

}  // namespace

extern "C" void neox_weight_gradient(int half, const void* a, const void* b, float* c, const int64_t* sizes, const int64_t* strides, int add,
                                     int threads) {
    if (half)
        gradient<Pair>((const uint16_t*)a, (const uint16_t*)b, c, sizes, strides, add, threads);
    else
        gradient<Single>((const float*)a, (const float*)b, c, sizes, strides, add, threads);
}
