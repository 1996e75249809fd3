// What both directions of the attention of full sequences share: what a block of queries sees, and scores.
//
// For each block of queries and each block of keys that it sees: scores, softmax (forward with a running maximum) and
// product. Of a block only those tiles are computed in which a query sees a key. Scores are exponents of 2. The forward
// pass saves the logarithm of each row's sum; the backward pass computes the weights again from it. Softmax and gradients
// are fp32. Rows behind the end are zeros.
// Python's side, shapes and checks: ../cpp_attention.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "products.h"

namespace {

constexpr int Q = 96, K = 192;  // queries and keys of a block
constexpr int GROUPS = Q / ROWS;
static_assert(Q % ROWS == 0 && K % ROWS == 0 && K % WIDE == 0 && Q % W == 0, "blocks are multiples of a tile");
constexpr int BORDER = 64;  // of the bias of a head: more than a tile reaches beyond the keys that a query sees
constexpr float LOG2_E = 1.44269504088896341f;

struct Strided {
    int64_t batch, head, position;
    int64_t at(int64_t b, int64_t h) const { return b * batch + h * head; }
};

struct Task {
    int64_t b, group, part;  // part: of the blocks of queries
};

struct Problem {
    int64_t batch, heads, groups, length, size;  // groups: key/value heads
    int64_t keys, shift;  // query i sees keys up to i + shift, of that many; bias only with shift 0
    Strided q, k, v, out;
    float scale, bound;    // of scores: bound tanh(score / bound), or 0 for none
    const int32_t* first;  // [batch, length] or null
    const float* bias;     // [heads, length] by distance, or null
    int64_t padded() const { return (keys + K - 1) / K * K; }
    int64_t blocks() const { return (length + Q - 1) / Q; }
    int64_t per() const { return heads / groups; }
    Task task(int64_t number, int64_t parts) const { return {number / parts / groups, number / parts % groups, number % parts}; }
    template <class T>
    Matrix<T> matrix(const T* x, const Strided& s, int64_t b, int64_t h) const { return {x + s.at(b, h), s.position, length, size}; }
    template <class T>
    Matrix<T> of_keys(const T* x, const Strided& s, int64_t b, int64_t h) const { return {x + s.at(b, h), s.position, keys, size}; }
};

// Rows that are needed soon and lie far apart: they come into the cache a few at a time, while tiles are computed.
class Ahead {
    static constexpr int64_t LINES = 32;  // of a step
    struct Part {
        const char* x;
        int64_t stride, bytes, rows;
    };
    Part parts[8];
    int count = 0, part = 0;
    int64_t row = 0;

public:
    void clear() { count = part = 0, row = 0; }
    template <class T>
    void add(const Matrix<T>& m, int64_t from, int64_t rows) {
        rows = std::min(rows, m.length - from);
        if (rows > 0) parts[count++] = {(const char*)m.row(from), m.stride * int64_t(sizeof(T)), m.size * int64_t(sizeof(T)), rows};
    }
    void step() {
        for (int64_t lines = 0; part < count && lines < LINES;) {
            const Part& p = parts[part];
            for (int64_t at = 0; at < p.bytes; at += 64, lines++) __builtin_prefetch(p.x + row * p.stride + at, 0, 2);
            if (++row == p.rows) part++, row = 0;
        }
    }
};

// A table by distance in the order of keys: that of a query and a key is at [BORDER + length - 1 + key - query].
struct ByKey {
    Buffer<float> x;
    int64_t length;
    explicit ByKey(int64_t length) : x(length + 2 * BORDER), length(length) {}
    void clear() { x.clear(); }
    void fill(const float* by_distance, float factor) {
        for (int64_t i = 0; i < length; i++) x[BORDER + length - 1 - i] = by_distance[i] * factor;
    }
    void take(float* by_distance) const {
        for (int64_t i = 0; i < length; i++) by_distance[i] = x[BORDER + length - 1 - i];
    }
    float* of(int64_t query, int64_t key) { return &x[BORDER + length - 1 + key - query]; }
};

// Columns of a block of keys.
struct Span {
    int from, to;
    int start() const { return from / WIDE * WIDE; }
    int stop() const { return (to + W - 1) / W * W; }
    bool has(int at) const { return from <= at && at < to; }
};

// What a block of queries sees.
struct Sight {
    int64_t q0, length, keys, shift;
    float factor, bound;  // of scores
    int32_t first[Q];  // key of each query
    ByKey *bias, *bias_grad;  // or null

    Sight(const Problem& p, int64_t b, int64_t q0, float factor, ByKey* bias, ByKey* bias_grad = nullptr)
        : q0(q0), length(p.length), keys(p.keys), shift(p.shift), factor(factor), bound(p.bound), bias(bias), bias_grad(bias_grad) {
        for (int64_t i = 0; i < Q; i++) first[i] = p.first ? p.first[b * length + std::min(q0 + i, length - 1)] : 0;
    }
    int64_t key() const { return first[0] / K * K; }
    int64_t rows() const { return std::min<int64_t>(Q, length - q0); }
    // The last key that a row sees.
    int64_t limit(int row) const { return std::min(q0 + row + shift, keys - 1); }
    int64_t last() const { return limit(Q - 1) + 1; }
    // Keys that some query of the tile sees, in whole tiles of rows.
    Span span(int row, int64_t k0) const {
        if (q0 + row >= length) return {0, 0};
        int64_t from = std::max<int64_t>(first[row] / ROWS * ROWS - k0, 0);
        int64_t to = std::min<int64_t>((limit(row + ROWS - 1) + ROWS) / ROWS * ROWS - k0, K);
        return from < to ? Span{int(from), int(to)} : Span{0, 0};
    }
    void put_spans(int64_t k0, Span (&spans)[GROUPS]) const {
        for (int i = 0; i < GROUPS; i++) spans[i] = span(i * ROWS, k0);
    }
    // Whether each query of a tile sees all its keys, and the scores are the products.
    bool plain(int row, int64_t key, int count) const { return !bias && key + count <= limit(row) + 1 && first[row + ROWS - 1] <= key; }
    Ints seen(int row, int64_t key) const {
        Ints at = numbered(Lanes()) + int32_t(key);
        return (at <= int32_t(limit(row))) & (at >= first[row]);
    }
};

// Scores within a bound, and how they change with those before, where that is asked for.
[[gnu::noinline]] inline void bind(Floats* x, int count, float bound, float* slopes) {
    for (int i = 0; i < count; i++) {
        Floats share = tanh_of_powers(x[i] * (2.0f / bound));
        x[i] = share * (bound * LOG2_E);
        if (slopes) put(slopes + i * W, 1.0f - share * share);
    }
}

// Products of a tile become scores: times the factor, unless that is in the packed queries, with bound, bias and mask.
template <class P, int NV, bool PLAIN>
ALWAYS_INLINE void score(const Sight& sight, Floats (&x)[ROWS][NV], int row, int64_t key, float* slopes = nullptr) {
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++)
            if (P::PER > 1) x[i][j] *= sight.factor;
    if (sight.bound > 0) {
        Floats copy[ROWS][NV];  // in memory, while the tile stays in registers
        std::memcpy(copy, x, sizeof x);
        bind(copy[0], ROWS * NV, sight.bound, slopes);
        std::memcpy(x, copy, sizeof x);
    }
    if (PLAIN) return;
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            if (sight.bias) x[i][j] += load<Floats>(sight.bias->of(sight.q0 + row + i, key + j * W));
            x[i][j] = sight.seen(row + i, key + j * W) ? x[i][j] : all(-INFINITY);
        }
}

// Calls work(row, column, number of vectors) for each tile of a block in which a query sees a key.
template <class F>
ALWAYS_INLINE void each_tile(const Span (&spans)[GROUPS], F work) {
    for (int column = 0; column < K; column += WIDE)
        for (int group = 0; group < GROUPS; group++) {
            const Span& span = spans[group];
            if (column < span.start() || column >= span.stop()) continue;
            if (column + WIDE <= span.stop())
                work(group * ROWS, column, std::integral_constant<int, 2>());
            else
                work(group * ROWS, column, std::integral_constant<int, 1>());
        }
}

// c [ROWS, size] += a b, with rows of c that are neighbours.
template <class P, int AR, int AK>
void add_to_rows(const typename P::Cell* a, const typename P::Cell* b, int64_t count, int64_t size, float* c) {
    if (count < 1) return;
    int64_t column = 0;
    for (; column + WIDE <= size; column += WIDE) add_to_tile<P, 2, AR, AK>(a, b + column, size, count, c + column, size);
    for (; column < size; column += W) add_to_tile<P, 1, AR, AK>(a, b + column, size, count, c + column, size);
}

// A tile's queries turned, one tile behind the other, and W cells that packing may overwrite.
template <class P, class T>
void pack_queries(const Matrix<T>& m, int64_t q0, float factor, typename P::Cell* to) {
    for (int64_t row = 0; row < Q; row += ROWS) pack_turned<P>(m, q0 + row, ROWS, factor, to + row * m.size / P::PER);
}

template <class P, class T>
void pack_keys(const Matrix<T>& m, int64_t padded, typename P::Cell* to) {
    for (int64_t k0 = 0; k0 < padded; k0 += K) pack_turned<P>(m, k0, K, 1.0f, to + k0 * m.size / P::PER);
}

template <class T>
void put_rows(const float* x, int64_t count, int64_t size, float factor, T* to, int64_t stride) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < size; j += W) put(to + i * stride + j, load<Floats>(x + i * size + j) * factor);
}

inline Problem problem(const int64_t* n, const int64_t* s, float scale, float bound, const int32_t* first, const float* bias) {
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], {s[0], s[1], s[2]}, {s[3], s[4], s[5]}, {s[6], s[7], s[8]}, {s[9], s[10], s[11]}, scale, bound, first, bias};
}

}  // namespace
