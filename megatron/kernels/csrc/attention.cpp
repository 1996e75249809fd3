// Causal attention of full sequences on a processor, forward and backward, in blocks that stay in the cache.
//
// For each block of queries and each block of keys that it sees: scores, softmax (forward with a running maximum) and
// product. The forward pass saves the logarithm of each row's sum; the backward pass computes the weights again from it.
// Products of blocks are made of cells: one fp32 number, or, where the processor multiplies them, a pair of bfloat16
// along the dimension that is summed. Sums, softmax and gradients are fp32. Rows behind the end are zeros.
// Python's side, shapes and checks: ../cpp_attention.py.

#include <algorithm>
#include <cmath>
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
constexpr int ROWS = 12;
#else
constexpr int ROWS = 6;
#endif
constexpr int Q = 48, K = 96;  // queries and keys of a block
static_assert(Q % ROWS == 0 && K % ROWS == 0 && K % (2 * W) == 0, "blocks are multiples of the small product");

// Cells of one fp32 number.
struct Single {
    typedef float Cell;
    static constexpr int PER = 1;
    static Cell join(float first, float) { return first; }
    static Cell join(uint16_t first, uint16_t) { return wide(first); }
    static void add_product(Floats& sum, Cell left, const Cell* right) { sum += left * load<Floats>(right); }
};

#if defined(__AVX512BF16__)
// Cells of two bfloat16 numbers, the first in the low half.
struct Pair {
    typedef uint32_t Cell;
    static constexpr int PER = 2;
    static Cell join(uint16_t first, uint16_t second) { return Cell(first) | Cell(second) << 16; }
    // W cells of numbers that are neighbours in a row, and W of numbers of two rows.
    static void put_along_row(const float* x, Cell* to) {
        __m512bh found = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + W), _mm512_loadu_ps(x));
        std::memcpy(to, &found, sizeof found);
    }
    static void put_across_rows(const float* first, const float* second, Cell* to) {
        __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(first)));
        __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(second)));
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    static void add_product(Floats& sum, Cell left, const Cell* right) {
        sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)_mm512_loadu_si512(right));
    }
};
#else
typedef Single Pair;
#endif

// ROWS x (NV * W) results in registers: c (+)= a b, with a[row * ar + k * ak], b[k * bk + column].
template <class P, int NV>
inline void small_product(const typename P::Cell* a, int64_t ar, int64_t ak, const typename P::Cell* b, int64_t bk, int64_t count, float* c,
                          int64_t cr, bool add) {
    Floats sum[ROWS][NV];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = add ? load<Floats>(c + i * cr + j * W) : Floats{};
    for (int64_t k = 0; k < count; k++)
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) P::add_product(sum[i][j], a[i * ar + k * ak], b + k * bk + j * W);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) put(c + i * cr + j * W, sum[i][j]);
}

// c [rows, columns] (+)= a b over count cells; rows is a multiple of ROWS, columns of W.
template <class P>
void product(int64_t rows, int64_t columns, int64_t count, const typename P::Cell* a, int64_t ar, int64_t ak, const typename P::Cell* b,
             int64_t bk, float* c, int64_t cr, bool add) {
    int64_t column = 0;
    for (; column + 2 * W <= columns; column += 2 * W)
        for (int64_t row = 0; row < rows; row += ROWS)
            small_product<P, 2>(a + row * ar, ar, ak, b + column, bk, count, c + row * cr + column, cr, add);
    for (; column < columns; column += W)
        for (int64_t row = 0; row < rows; row += ROWS)
            small_product<P, 1>(a + row * ar, ar, ak, b + column, bk, count, c + row * cr + column, cr, add);
}

struct Strided {
    int64_t batch, head, position;
    int64_t at(int64_t b, int64_t h) const { return b * batch + h * head; }
};

struct Problem {
    int64_t batch, heads, groups, length, size;  // groups: key/value heads
    Strided q, k, v, out;
    float scale;
    const int32_t* first;  // [batch, length] or null
    const float* bias;     // [heads, length] by distance, or null
    int64_t padded() const { return (length + K - 1) / K * K; }
    int64_t blocks() const { return (length + Q - 1) / Q; }
    int64_t first_of(int64_t b, int64_t row) const { return first ? first[b * length + row] : 0; }
};

// A matrix [length, size], zeros behind its end.
template <class T>
struct Matrix {
    const T* x;
    int64_t stride, length, size;
    T at(int64_t row, int64_t column) const { return row < length ? x[row * stride + column] : T(0); }
};

// Cells along the columns: [count, size / PER], rows from `from` on.
template <class P, class T>
void pack_rows(const Matrix<T>& m, int64_t from, int64_t count, typename P::Cell* to) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < m.size; j += P::PER) *to++ = P::join(m.at(from + i, j), m.at(from + i, j + P::PER - 1));
}

// Cells along the rows: [count / PER, size].
template <class P, class T>
void pack_columns(const Matrix<T>& m, int64_t from, int64_t count, typename P::Cell* to) {
    for (int64_t i = 0; i < count; i += P::PER)
        for (int64_t j = 0; j < m.size; j++) *to++ = P::join(m.at(from + i, j), m.at(from + i + P::PER - 1, j));
}

// The transpose of each block of K rows, with cells along the columns: [blocks][size / PER, K].
template <class P, class T>
void pack_turned(const Matrix<T>& m, int64_t padded, typename P::Cell* to) {
    int64_t cells = m.size / P::PER;
    for (int64_t block = 0; block < padded; block += K)
        for (int64_t i = 0; i < K; i++)
            for (int64_t j = 0; j < cells; j++)
                to[block * cells + j * K + i] = P::join(m.at(block + i, j * P::PER), m.at(block + i, (j + 1) * P::PER - 1));
}

// Cells of a block [Q, K] of fp32, along its rows or its columns; the block itself where a cell is one number.
template <class P>
struct Weights {
    const typename P::Cell *along_rows, *along_columns;
    std::vector<typename P::Cell> rows, columns;
    Weights() : rows(P::PER > 1 ? Q * K / P::PER : 0), columns(rows.size()) {}

    void pack_rows(const float* x) {
        if constexpr (P::PER == 1)
            along_rows = x;
        else {
            along_rows = rows.data();
            for (int64_t i = 0; i < Q * K / P::PER; i += W) P::put_along_row(x + i * P::PER, &rows[i]);
        }
    }
    void pack_columns(const float* x) {
        if constexpr (P::PER == 1)
            along_columns = x;
        else {
            along_columns = columns.data();
            for (int64_t i = 0; i < Q; i += P::PER)
                for (int64_t j = 0; j < K; j += W) P::put_across_rows(x + i * K + j, x + (i + 1) * K + j, &columns[i / P::PER * K + j]);
        }
    }
};

// scores [Q, K] of queries from q0 and keys from k0: adds a bias and hides.
void mask(const Problem& p, int64_t b, int64_t head, int64_t q0, int64_t k0, float* scores) {
    for (int64_t i = 0; i < Q; i++) {
        float* row = scores + i * K;
        int64_t query = q0 + i;
        if (query >= p.length) {
            std::fill(row, row + K, -INFINITY);
            continue;
        }
        int64_t start = std::clamp<int64_t>(p.first_of(b, query) - k0, 0, K), stop = std::clamp<int64_t>(query + 1 - k0, 0, K);
        if (p.bias) {
            const float* bias = p.bias + head * p.length;
            for (int64_t j = start; j < stop; j++) row[j] += bias[query - k0 - j];
        }
        std::fill(row, row + start, -INFINITY);
        std::fill(row + std::max(start, stop), row + K, -INFINITY);
    }
}

// The scores of a block of queries and one of keys, scaled, with bias and mask.
template <class P>
void score(const Problem& p, int64_t b, int64_t head, int64_t q0, int64_t k0, const typename P::Cell* rows, const typename P::Cell* turned,
           float* scores) {
    int64_t cells = p.size / P::PER;
    product<P>(Q, K, cells, rows, cells, 1, turned + k0 * cells, K, scores, K, false);
    for (int64_t i = 0; i < Q * K; i++) scores[i] *= p.scale;
    bool hides = p.bias || q0 + Q > p.length || k0 + K - 1 > q0 || (p.first && p.first_of(b, q0 + Q - 1) > k0);
    if (hides) mask(p, b, head, q0, k0, scores);
}

// One row of scores becomes e^(score - maximum); the sum and the results so far follow a larger maximum.
inline void weigh(float* row, int64_t size, float& most, float& total, float* found) {
    Floats best = load<Floats>(row), sum{};
    for (int j = W; j < K; j += W) best = larger(best, load<Floats>(row + j));
    float now = std::max(most, largest_of(best)), base = now == -INFINITY ? 0.0f : now, before = std::exp(most - base);
    for (int j = 0; j < K; j += W) {
        Floats e = exponential(load<Floats>(row + j) - base);
        put(row + j, e);
        sum += e;
    }
    total = total * before + sum_of(sum);
    if (now != most)
        for (int64_t j = 0; j < size; j++) found[j] *= before;
    most = now;
}

template <class P, class T>
void forward(const Problem& p, const T* q, const T* k, const T* v, T* out, float* sums, int threads) {
    typedef typename P::Cell Cell;
    int64_t per = p.heads / p.groups, padded = p.padded(), size = p.size, tasks = p.batch * p.groups;
    int64_t parts = std::max<int64_t>(1, std::min<int64_t>(p.blocks(), (2 * threads + tasks - 1) / tasks));
#pragma omp parallel num_threads(threads)
    {
        std::vector<Cell> turned(padded * size / P::PER), values(padded * size / P::PER), rows(Q * size / P::PER);
        std::vector<float> found(Q * size), scores(Q * K);
        Weights<P> weights;
        float most[Q], total[Q];
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t group = 0; group < p.groups; group++)
                for (int64_t part = 0; part < parts; part++) {
                    pack_turned<P>(Matrix<T>{k + p.k.at(b, group), p.k.position, p.length, size}, padded, turned.data());
                    pack_columns<P>(Matrix<T>{v + p.v.at(b, group), p.v.position, p.length, size}, 0, padded, values.data());
                    for (int64_t head = group * per; head < (group + 1) * per; head++)
                        for (int64_t block = part; block < p.blocks(); block += parts) {
                            int64_t q0 = block * Q, last = std::min(q0 + Q, p.length);
                            pack_rows<P>(Matrix<T>{q + p.q.at(b, head), p.q.position, p.length, size}, q0, Q, rows.data());
                            std::fill(most, most + Q, -INFINITY);
                            std::fill(total, total + Q, 0.0f);
                            std::fill(found.begin(), found.end(), 0.0f);
                            for (int64_t k0 = p.first_of(b, q0) / K * K; k0 < last; k0 += K) {
                                score<P>(p, b, head, q0, k0, rows.data(), turned.data(), scores.data());
                                for (int64_t i = 0; i < Q; i++) weigh(&scores[i * K], size, most[i], total[i], &found[i * size]);
                                weights.pack_rows(scores.data());
                                product<P>(Q, size, K / P::PER, weights.along_rows, K / P::PER, 1, &values[k0 * size / P::PER], size,
                                           found.data(), size, true);
                            }
                            for (int64_t i = q0; i < last; i++) {
                                T* to = out + p.out.at(b, head) + i * p.out.position;
                                float share = 1.0f / total[i - q0];
                                for (int64_t j = 0; j < size; j++) narrow(found[(i - q0) * size + j] * share, to + j);
                                sums[(b * p.heads + head) * p.length + i] = most[i - q0] + std::log(total[i - q0]);
                            }
                        }
                }
    }
}

struct Gradients {
    Strided out, q, k, v;
    float* bias;  // [batch, heads, length] or null, zeros at first
};

template <class T>
void put_rows(const float* x, int64_t count, int64_t size, float factor, T* to, int64_t stride) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < size; j++) narrow(x[i * size + j] * factor, to + i * stride + j);
}

// The gradient of the scores: weights (p from the scores) and p (dp - delta), dp being in `grads` [Q, K] at first.
inline void differentiate(float* weights, float* grads, const float* sum, const float* delta) {
    for (int64_t i = 0; i < Q; i++)
        for (int j = 0; j < K; j += W) {
            float *weight = weights + i * K + j, *grad = grads + i * K + j;
            Floats p = exponential(load<Floats>(weight) - sum[i]);
            put(weight, p);
            put(grad, p * (load<Floats>(grad) - delta[i]));
        }
}

template <class T>
inline float row_product(const Matrix<T>& a, const Matrix<T>& b, int64_t row) {
    Floats sum{};
    for (int64_t j = 0; j < a.size; j += W) sum += load_wide(a.x + row * a.stride + j) * load_wide(b.x + row * b.stride + j);
    return sum_of(sum);
}

template <class P, class T>
void backward(const Problem& p, const Gradients& g, const T* q, const T* k, const T* v, const T* out, const T* grad, const float* sums, T* gq, T* gk,
              T* gv, int threads) {
    typedef typename P::Cell Cell;
    int64_t per = p.heads / p.groups, padded = p.padded(), size = p.size, all_cells = padded * size / P::PER, cells = size / P::PER;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Cell> keys(all_cells), turned(all_cells), turned_values(all_cells);
        std::vector<Cell> rows(Q * cells), columns(Q * cells), grad_rows(Q * cells), grad_columns(Q * cells);
        std::vector<float> grad_keys(padded * size), grad_values(padded * size), found(Q * size), weights(Q * K), scores(Q * K);
        Weights<P> packed, packed_grads;
        float delta[Q], sum[Q];
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < p.batch; b++)
            for (int64_t group = 0; group < p.groups; group++) {
                Matrix<T> own{k + p.k.at(b, group), p.k.position, p.length, size};
                pack_columns<P>(own, 0, padded, keys.data());
                pack_turned<P>(own, padded, turned.data());
                pack_turned<P>(Matrix<T>{v + p.v.at(b, group), p.v.position, p.length, size}, padded, turned_values.data());
                std::fill(grad_keys.begin(), grad_keys.end(), 0.0f);
                std::fill(grad_values.begin(), grad_values.end(), 0.0f);
                for (int64_t head = group * per; head < (group + 1) * per; head++) {
                    Matrix<T> queries{q + p.q.at(b, head), p.q.position, p.length, size};
                    Matrix<T> given{grad + g.out.at(b, head), g.out.position, p.length, size};
                    Matrix<T> result{out + p.out.at(b, head), p.out.position, p.length, size};
                    for (int64_t q0 = 0; q0 < p.length; q0 += Q) {
                        int64_t last = std::min(q0 + Q, p.length);
                        pack_rows<P>(queries, q0, Q, rows.data());
                        pack_rows<P>(given, q0, Q, grad_rows.data());
                        if constexpr (P::PER > 1) {
                            pack_columns<P>(queries, q0, Q, columns.data());
                            pack_columns<P>(given, q0, Q, grad_columns.data());
                        }
                        const Cell *query_columns = P::PER > 1 ? columns.data() : rows.data();
                        const Cell *given_columns = P::PER > 1 ? grad_columns.data() : grad_rows.data();
                        std::fill(delta, delta + Q, 0.0f);
                        std::fill(sum, sum + Q, 0.0f);
                        for (int64_t i = q0; i < last; i++) {
                            delta[i - q0] = row_product(result, given, i);
                            sum[i - q0] = sums[(b * p.heads + head) * p.length + i];
                        }
                        std::fill(found.begin(), found.end(), 0.0f);
                        for (int64_t k0 = p.first_of(b, q0) / K * K; k0 < last; k0 += K) {
                            score<P>(p, b, head, q0, k0, rows.data(), turned.data(), weights.data());
                            product<P>(Q, K, cells, grad_rows.data(), cells, 1, &turned_values[k0 * cells], K, scores.data(), K, false);
                            differentiate(weights.data(), scores.data(), sum, delta);
                            packed.pack_columns(weights.data());
                            packed_grads.pack_columns(scores.data());
                            packed_grads.pack_rows(scores.data());
                            product<P>(K, size, Q / P::PER, packed.along_columns, 1, K, given_columns, size, &grad_values[k0 * size], size, true);
                            product<P>(K, size, Q / P::PER, packed_grads.along_columns, 1, K, query_columns, size, &grad_keys[k0 * size], size, true);
                            product<P>(Q, size, K / P::PER, packed_grads.along_rows, K / P::PER, 1, &keys[k0 * cells], size, found.data(), size, true);
                            if (g.bias) {
                                float* bias = g.bias + (b * p.heads + head) * p.length;
                                for (int64_t i = q0; i < last; i++)
                                    for (int64_t j = k0; j <= std::min(i, k0 + K - 1); j++) bias[i - j] += scores[(i - q0) * K + j - k0];
                            }
                        }
                        put_rows(found.data(), last - q0, size, p.scale, gq + g.q.at(b, head) + q0 * g.q.position, g.q.position);
                    }
                }
                put_rows(grad_keys.data(), p.length, size, p.scale, gk + g.k.at(b, group), g.k.position);
                put_rows(grad_values.data(), p.length, size, 1.0f, gv + g.v.at(b, group), g.v.position);
            }
    }
}

Problem problem(const int64_t* n, const int64_t* s, float scale, const int32_t* first, const float* bias) {
    return {n[0], n[1], n[2], n[3], n[4], {s[0], s[1], s[2]}, {s[3], s[4], s[5]}, {s[6], s[7], s[8]}, {s[9], s[10], s[11]}, scale, first, bias};
}

template <class P, class T>
void forward_of(const Problem& p, const void** x, float* sums, int threads) {
    forward<P>(p, (const T*)x[0], (const T*)x[1], (const T*)x[2], (T*)x[3], sums, threads);
}

template <class P, class T>
void backward_of(const Problem& p, const Gradients& g, const void** x, const float* sums, int threads) {
    backward<P>(p, g, (const T*)x[0], (const T*)x[1], (const T*)x[2], (const T*)x[3], (const T*)x[4], sums, (T*)x[5], (T*)x[6], (T*)x[7], threads);
}

}  // namespace

extern "C" {

// x: q, k, v and out; strides of each by batch, head and position.
void neox_attention(int half, const void** x, float* sums, const int64_t* sizes, const int64_t* strides, float scale, const int32_t* first,
                    const float* bias, int threads) {
    Problem p = problem(sizes, strides, scale, first, bias);
    half ? forward_of<Pair, uint16_t>(p, x, sums, threads) : forward_of<Single, float>(p, x, sums, threads);
}

// x: q, k, v, out, the gradient of out, and the gradients of q, k and v, which are written.
void neox_attention_backward(int half, const void** x, const float* sums, const int64_t* sizes, const int64_t* s, float scale,
                             const int32_t* first, const float* bias, float* grad_bias, int threads) {
    Problem p = problem(sizes, s, scale, first, bias);
    Gradients g{{s[12], s[13], s[14]}, {s[15], s[16], s[17]}, {s[18], s[19], s[20]}, {s[21], s[22], s[23]}, grad_bias};
    half ? backward_of<Pair, uint16_t>(p, g, x, sums, threads) : backward_of<Single, float>(p, g, x, sums, threads);
}
}
