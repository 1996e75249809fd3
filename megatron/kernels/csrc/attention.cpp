// Causal attention of full sequences, and attention to earlier keys, on a processor, in blocks that stay in the cache
// (attention.h). A query that sees no key has a result of 0, and -inf for the logarithm of its sum.

#include "attention.h"

namespace {

template <class P, int NV, bool PLAIN>
[[gnu::noinline]] void score_tile(const Sight& sight, const typename P::Cell* queries, const typename P::Cell* turned, int64_t cells, int row, int64_t key,
                       float* to) {
    Floats x[ROWS][NV] = {};
    add_products<P, NV>(x, queries, 1, ROWS, turned, K, cells);
    score<P, NV, PLAIN>(sight, x, row, key);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) put(to + i * K + j * W, x[i][j]);
}

// Rows of a block of queries: the largest score so far, the sum of weights, and the results, both of that scale.
struct Running {
    alignas(64) float most[Q], base[Q], before[Q], total[Q];
    Buffer<float> found;
    int64_t size;
    explicit Running(int64_t size) : found(Q * size), size(size) {}

    void start() {
        std::fill(most, most + Q, -INFINITY);
        std::fill(total, total + Q, 0.0f);
        found.clear();
    }
    // Sums and results follow a larger maximum of each row.
    void follow(const float* now) {
        for (int i = 0; i < Q; i += W) {
            Floats most_now = load<Floats>(now + i), from = most_now == all(-INFINITY) ? Floats{} : most_now;
            Floats change = power_of_two(load<Floats>(most + i) - from);
            put(most + i, most_now);
            put(base + i, from);
            put(before + i, change);
            put(total + i, load<Floats>(total + i) * change);
        }
        for (int64_t i = 0; i < Q; i++)
            if (before[i] != 1.0f)
                for (int64_t j = 0; j < size; j += W) put(&found[i * size + j], load<Floats>(&found[i * size + j]) * before[i]);
    }
};

// Scores [Q, K] become weights, along the rows; `running` follows.
template <class P>
void weigh(const Span (&spans)[GROUPS], const float* scores, typename P::Cell* weights, Running& running) {
    alignas(64) float now[Q];
    for (int i = 0; i < Q; i++) {
        const Span& span = spans[i / ROWS];
        Floats best = all(running.most[i]);
        for (int j = span.start(); j < span.stop(); j += W) best = larger(best, load<Floats>(scores + i * K + j));
        now[i] = largest_of(best);
    }
    running.follow(now);
    for (int i = 0; i < Q; i++) {
        const Span& span = spans[i / ROWS];
        Floats sum{}, e[2];
        float base = running.base[i];
        int j = span.start();
        for (; j + WIDE <= span.stop(); j += WIDE) {
            for (int half = 0; half < 2; half++) sum += e[half] = power_of_two(load<Floats>(scores + i * K + j + half * W) - base);
            P::template put_along_row<2>(e, weights + (i * K + j) / P::PER);
        }
        if (j < span.stop()) {
            sum += e[0] = power_of_two(load<Floats>(scores + i * K + j) - base);
            P::template put_along_row<1>(e, weights + (i * K + j) / P::PER);
        }
        running.total[i] += sum_of(sum);
    }
}

template <class P, class T>
struct Forward {
    typedef typename P::Cell Cell;
    const Problem& p;
    const T *q, *k, *v;
    T* out;
    float* sums;
    int64_t parts, tasks, size, cells;
    float factor;
    Buffer<Cell> turned, values, queries, weights;
    Buffer<float> scores;
    ByKey bias;
    Running running;
    Ahead ahead;

    Forward(const Problem& p, const T* q, const T* k, const T* v, T* out, float* sums, int64_t parts)
        : p(p), q(q), k(k), v(v), out(out), sums(sums), parts(parts), tasks(p.batch * p.groups * parts), size(p.size), cells(size / P::PER),
          factor(p.scale * LOG2_E), turned(p.padded() * cells + W), values(p.padded() * cells), queries(Q * cells + W), weights(Q * K / P::PER),
          scores(Q * K), bias(p.bias ? p.length : 0), running(size) {}

    void compute(int64_t number, int64_t next) {
        Task task = p.task(number, parts);
        pack_keys<P>(p.of_keys(k, p.k, task.b, task.group), p.padded(), turned.data());
        pack_columns<P>(p.of_keys(v, p.v, task.b, task.group), 0, p.padded(), values.data());
        for (int64_t head = task.group * p.per(); head < (task.group + 1) * p.per(); head++) {
            if (p.bias) bias.fill(p.bias + head * p.length, LOG2_E);
            for (int64_t block = task.part; block < p.blocks(); block += parts) {
                look_ahead(task, head, block, next);
                compute_block(task.b, head, block * Q);
            }
        }
    }

    void look_ahead(const Task& task, int64_t head, int64_t block, int64_t next) {
        bool last_head = head + 1 == (task.group + 1) * p.per(), last_block = block + parts >= p.blocks();
        ahead.clear();
        ahead.add(p.matrix<T>(out, p.out, task.b, head), block * Q, Q);
        if (!last_block)
            ahead.add(p.matrix(q, p.q, task.b, head), (block + parts) * Q, Q);
        else if (!last_head)
            ahead.add(p.matrix(q, p.q, task.b, head + 1), task.part * Q, Q);
        if (!last_head || next >= tasks) return;
        Task then = p.task(next, parts);
        if (last_block) ahead.add(p.matrix(q, p.q, then.b, then.group * p.per()), then.part * Q, Q);
        ahead.add(p.of_keys(k, p.k, then.b, then.group), (block - task.part) * Q, parts * Q);
        ahead.add(p.of_keys(v, p.v, then.b, then.group), (block - task.part) * Q, parts * Q);
    }

    void compute_block(int64_t b, int64_t head, int64_t q0) {
        Sight sight(p, b, q0, factor, p.bias ? &bias : nullptr);
        pack_queries<P>(p.matrix(q, p.q, b, head), q0, factor, queries.data());
        running.start();
        for (int64_t k0 = sight.key(); k0 < sight.last(); k0 += K) add_keys(sight, k0);
        for (int64_t i = 0; i < sight.rows(); i++) {
            T* to = out + p.out.at(b, head) + (q0 + i) * p.out.position;
            put_rows(&running.found[i * size], 1, size, running.total[i] > 0 ? 1.0f / running.total[i] : 0.0f, to, 0);
            sums[(b * p.heads + head) * p.length + q0 + i] = running.most[i] + std::log2(running.total[i]);
        }
    }

    void add_keys(const Sight& sight, int64_t k0) {
        Span spans[GROUPS];
        sight.put_spans(k0, spans);
        each_tile(spans, [&](int row, int column, auto nv) {
            ahead.step();
            const Cell *a = &queries[row * cells], *to = &turned[k0 * cells + column];
            if (sight.plain(row, k0 + column, nv * W))
                score_tile<P, nv, true>(sight, a, to, cells, row, k0 + column, &scores[row * K + column]);
            else
                score_tile<P, nv, false>(sight, a, to, cells, row, k0 + column, &scores[row * K + column]);
        });
        weigh<P>(spans, scores.data(), weights.data(), running);
        for (int i = 0; i < GROUPS; i++) {
            const Span& span = spans[i];
            add_to_rows<P, K / P::PER, 1>(&weights[(i * ROWS * K + span.from) / P::PER], &values[(k0 + span.from) * cells],
                                          (span.to - span.from) / P::PER, size, &running.found[i * ROWS * size]);
        }
    }
};

template <class P, class T>
void forward_of(const Problem& p, const void** x, float* sums, int threads) {
    int64_t heads = p.batch * p.groups, parts = std::max<int64_t>(1, std::min<int64_t>(p.blocks(), (2 * threads + heads - 1) / heads));
#pragma omp parallel num_threads(threads)
    {
        Forward<P, T> forward(p, (const T*)x[0], (const T*)x[1], (const T*)x[2], (T*)x[3], sums, parts);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * parts; task++) forward.compute(task, task + threads);
    }
}

}  // namespace

// x: q, k, v and out; sums: the logarithm to base 2 of each row's sum, written; strides of each by batch, head and position.
extern "C" void neox_attention(int half, const void** x, float* sums, const int64_t* sizes, const int64_t* strides, float scale, float bound,
                               const int32_t* first, const float* bias, int threads) {
    Problem p = problem(sizes, strides, scale, bound, first, bias);
    half ? forward_of<Pair, uint16_t>(p, x, sums, threads) : forward_of<Single, float>(p, x, sums, threads);
}
