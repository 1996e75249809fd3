// The gradients of the causal attention of full sequences on a processor (attention.h).

#include "attention.h"

namespace {

struct Gradients {
    Strided out, q, k, v;
    float* bias;  // [batch, heads, length] or null
};

template <class T>
inline float row_product(const T* a, const T* b, int64_t size) {
    Floats sum{};
    for (int64_t j = 0; j < size; j += W) sum += load_wide(a + j) * load_wide(b + j);
    return sum_of(sum);
}

// A block of queries with the gradient of its results, and what both packed give.
template <class P, class T>
struct Rows {
    typedef typename P::Cell Cell;
    int64_t size, cells;
    Buffer<Cell> queries, grads;              // turned, for the scores and the gradients of weights
    Buffer<Cell> query_columns, grad_columns;  // [Q / PER, size], for the gradients of keys and values
    Buffer<float> found;                      // gradient of the queries
    float sums[Q], delta[Q];

    explicit Rows(int64_t size)
        : size(size), cells(size / P::PER), queries(Q * cells + W), grads(queries), query_columns(Q * cells), grad_columns(Q * cells), found(Q * size) {}

    void take(const Matrix<T>& q, const Matrix<T>& out, const Matrix<T>& grad, const float* known, int64_t q0, float factor) {
        pack_queries<P>(q, q0, factor, queries.data());
        pack_queries<P>(grad, q0, 1.0f, grads.data());
        pack_columns<P>(q, q0, Q, query_columns.data());
        pack_columns<P>(grad, q0, Q, grad_columns.data());
        found.clear();
        for (int64_t i = 0; i < Q; i++) {
            bool inside = q0 + i < q.length;
            sums[i] = inside ? known[q0 + i] : 0.0f;
            delta[i] = inside ? row_product(out.row(q0 + i), grad.row(q0 + i), size) : 0.0f;
        }
    }
};

// Weights and gradients of scores of a block, as operands of products: pairs across rows, and along them.
template <class P>
struct Block {
    Buffer<typename P::Cell> weights, grads, grads_along;
    Block() : weights(Q * K / P::PER), grads(Q * K / P::PER), grads_along(P::PER > 1 ? Q * K / P::PER : 0) {}
    const typename P::Cell* along() const { return P::PER > 1 ? grads_along.data() : grads.data(); }

    // Weights e^(score - sum) of a tile, and their gradients times weights; keys and values are packed from the tile's column.
    template <int NV, bool PLAIN, class T>
    [[gnu::noinline]] void compute(const Sight& sight, const Rows<P, T>& rows, const typename P::Cell* keys, const typename P::Cell* values, int row, int column,
                 int64_t k0) {
        Floats x[ROWS][NV] = {}, y[ROWS][NV];
        alignas(64) float weight[ROWS * NV * W], slope[ROWS * NV * W];
        add_products<P, NV>(x, &rows.queries[row * rows.cells], 1, ROWS, keys, K, rows.cells);
        score<P, NV, PLAIN>(sight, x, row, k0 + column, slope);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) {
                x[i][j] = power_of_two(x[i][j] - rows.sums[row + i]);
                put(weight + (i * NV + j) * W, x[i][j]);
            }
        put_across<NV>(x, &weights[row * K / P::PER + column]);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) y[i][j] = all(-rows.delta[row + i]);
        add_products<P, NV>(y, &rows.grads[row * rows.cells], 1, ROWS, values, K, rows.cells);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) {
                y[i][j] *= load<Floats>(weight + (i * NV + j) * W);
                if (!PLAIN) y[i][j] = sight.seen(row + i, k0 + column + j * W) ? y[i][j] : Floats{};
            }
        if (!PLAIN && sight.bias_grad)  // a bias is added behind the bound
            for (int i = 0; i < ROWS; i++)
                for (int j = 0; j < NV; j++) {
                    float* to = sight.bias_grad->of(sight.q0 + row + i, k0 + column + j * W);
                    put(to, load<Floats>(to) + y[i][j]);
                }
        if (sight.bound > 0)
#pragma GCC unroll 12
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < NV; j++) y[i][j] *= load<Floats>(slope + (i * NV + j) * W);
        put_across<NV>(y, &grads[row * K / P::PER + column]);
        if constexpr (P::PER > 1)
            for (int i = 0; i < ROWS; i++) P::template put_along_row<NV>(y[i], &grads_along[((row + i) * K + column) / P::PER]);
    }

    template <int NV>
    static ALWAYS_INLINE void put_across(const Floats (&x)[ROWS][NV], typename P::Cell* to) {
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i += P::PER)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) {
                typename P::Cells found = P::across_rows(x[i][j], x[i + P::PER - 1][j]);
                std::memcpy(to + i / P::PER * K + j * W, &found, sizeof found);
            }
    }
};

// Keys and values of a head of both, packed, and their gradients.
template <class P>
struct Columns {
    typedef typename P::Cell Cell;
    int64_t padded, size, cells;
    Buffer<Cell> keys, turned_keys, turned_values;
    Buffer<float> grad_keys, grad_values;

    Columns(int64_t padded, int64_t size)
        : padded(padded), size(size), cells(size / P::PER), keys(padded * cells), turned_keys(padded * cells + W), turned_values(turned_keys),
          grad_keys(padded * size), grad_values(padded * size) {}

    template <class T>
    void take(const Matrix<T>& k, const Matrix<T>& v) {
        pack_columns<P>(k, 0, padded, keys.data());
        pack_keys<P>(k, padded, turned_keys.data());
        pack_keys<P>(v, padded, turned_values.data());
        grad_keys.clear();
        grad_values.clear();
    }

    // c [K, size] += a b, with a [Q, K] turned, for the keys that a query sees.
    void add_turned(const Span (&spans)[GROUPS], const Buffer<Cell>& a, const Buffer<Cell>& b, float* c) const {
        for (int column = 0; column < K; column += ROWS) {
            int from = 0, to = GROUPS;
            while (from < GROUPS && !spans[from].has(column)) from++;
            while (to > from && !spans[to - 1].has(column)) to--;
            int64_t first = from * ROWS / P::PER;
            add_to_rows<P, 1, K>(&a[first * K + column], &b[first * size], (to - from) * ROWS / P::PER, size, c + column * size);
        }
    }

    // All gradients get the part of a block of queries and one of keys.
    template <class T>
    void add_block(const Sight& sight, int64_t k0, Rows<P, T>& rows, Block<P>& block, Ahead& ahead) {
        Span spans[GROUPS];
        sight.put_spans(k0, spans);
        each_tile(spans, [&](int row, int column, auto nv) {
            ahead.step();
            const Cell *k = &turned_keys[k0 * cells + column], *v = &turned_values[k0 * cells + column];
            if (sight.plain(row, k0 + column, nv * W))
                block.template compute<nv, true>(sight, rows, k, v, row, column, k0);
            else
                block.template compute<nv, false>(sight, rows, k, v, row, column, k0);
        });
        add_turned(spans, block.weights, rows.grad_columns, &grad_values[k0 * size]);
        add_turned(spans, block.grads, rows.query_columns, &grad_keys[k0 * size]);
        for (int i = 0; i < GROUPS; i++) {
            const Span& span = spans[i];
            add_to_rows<P, K / P::PER, 1>(block.along() + (i * ROWS * K + span.from) / P::PER, &keys[(k0 + span.from) * cells],
                                          (span.to - span.from) / P::PER, size, &rows.found[i * ROWS * size]);
        }
    }
};

template <class P, class T>
struct Backward {
    const Problem& p;
    const Gradients& g;
    const T *q, *k, *v, *out, *grad;
    const float* sums;
    T *gq, *gk, *gv;
    Columns<P> columns;
    Rows<P, T> rows;
    Block<P> block;
    ByKey bias, bias_grad;
    Ahead ahead;

    Backward(const Problem& p, const Gradients& g, const void** x, const float* sums)
        : p(p), g(g), q((const T*)x[0]), k((const T*)x[1]), v((const T*)x[2]), out((const T*)x[3]), grad((const T*)x[4]), sums(sums), gq((T*)x[5]),
          gk((T*)x[6]), gv((T*)x[7]), columns(p.padded(), p.size), rows(p.size), bias(p.bias ? p.length : 0), bias_grad(g.bias ? p.length : 0) {}

    void compute(int64_t number, int64_t next) {
        Task task = p.task(number, 1);
        columns.take(p.of_keys(k, p.k, task.b, task.group), p.of_keys(v, p.v, task.b, task.group));
        for (int64_t head = task.group * p.per(); head < (task.group + 1) * p.per(); head++) {
            int64_t at = (task.b * p.heads + head) * p.length;
            if (p.bias) bias.fill(p.bias + head * p.length, LOG2_E);
            if (g.bias) bias_grad.clear();
            for (int64_t q0 = 0; q0 < p.length; q0 += Q) {
                look_ahead(task, head, q0, next);
                compute_block(task.b, head, q0, sums + at);
            }
            if (g.bias) bias_grad.take(g.bias + at);
        }
        put_rows(columns.grad_keys.data(), p.keys, p.size, p.scale, gk + g.k.at(task.b, task.group), g.k.position);
        put_rows(columns.grad_values.data(), p.keys, p.size, 1.0f, gv + g.v.at(task.b, task.group), g.v.position);
    }

    void add_ahead(int64_t b, int64_t head, int64_t q0) {
        ahead.add(p.matrix(q, p.q, b, head), q0, Q);
        ahead.add(p.matrix(out, p.out, b, head), q0, Q);
        ahead.add(p.matrix(grad, g.out, b, head), q0, Q);
    }

    void look_ahead(const Task& task, int64_t head, int64_t q0, int64_t next) {
        bool last_head = head + 1 == (task.group + 1) * p.per(), last_block = q0 + Q >= p.length;
        ahead.clear();
        ahead.add(p.matrix<T>(gq, g.q, task.b, head), q0, Q);
        if (!last_block)
            add_ahead(task.b, head, q0 + Q);
        else if (!last_head)
            add_ahead(task.b, head + 1, 0);
        if (!last_head) return;
        ahead.add(p.of_keys<T>(gk, g.k, task.b, task.group), q0, Q);
        ahead.add(p.of_keys<T>(gv, g.v, task.b, task.group), q0, Q);
        if (next >= p.batch * p.groups) return;
        Task then = p.task(next, 1);
        ahead.add(p.of_keys(k, p.k, then.b, then.group), q0, Q);
        ahead.add(p.of_keys(v, p.v, then.b, then.group), q0, Q);
        if (last_block) add_ahead(then.b, then.group * p.per(), 0);
    }

    void compute_block(int64_t b, int64_t head, int64_t q0, const float* known) {
        Sight sight(p, b, q0, p.scale * LOG2_E, p.bias ? &bias : nullptr, g.bias ? &bias_grad : nullptr);
        rows.take(p.matrix(q, p.q, b, head), p.matrix(out, p.out, b, head), p.matrix(grad, g.out, b, head), known, q0, sight.factor);
        for (int64_t k0 = sight.key(); k0 < sight.last(); k0 += K) columns.add_block(sight, k0, rows, block, ahead);
        put_rows(rows.found.data(), sight.rows(), p.size, p.scale, gq + g.q.at(b, head) + q0 * g.q.position, g.q.position);
    }
};

template <class P, class T>
void backward_of(const Problem& p, const Gradients& g, const void** x, const float* sums, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Backward<P, T> backward(p, g, x, sums);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p.batch * p.groups; task++) backward.compute(task, task + threads);
    }
}

}  // namespace

// x: q, k, v, out, the gradient of out, and the gradients of q, k and v, which are written.
extern "C" void neox_attention_backward(int half, const void** x, const float* sums, const int64_t* sizes, const int64_t* s, float scale, float bound,
                                        const int32_t* first, const float* bias, float* grad_bias, int threads) {
    Problem p = problem(sizes, s, scale, bound, first, bias);
    Gradients g{{s[12], s[13], s[14]}, {s[15], s[16], s[17]}, {s[18], s[19], s[20]}, {s[21], s[22], s[23]}, grad_bias};
    half ? backward_of<Pair, uint16_t>(p, g, x, sums, threads) : backward_of<Single, float>(p, g, x, sums, threads);
}
