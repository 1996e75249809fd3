// Softmax over a vocabulary, row by row: the log-sum-exp, and the gradient of a loss.
// A row is read from memory once; for the sum and the gradient it is in the cache. Sums are fp32.
// Python's side, shapes and checks: ../cpp_cross_entropy.py.

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace {

template <class T>
float largest(const T* row, int64_t count) {
    Floats most[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
        for (int j = 0; j < 4; j++) most[j] = larger(load_wide(row + i + j * W), most[j]);
    for (; i + W <= count; i += W) most[0] = larger(load_wide(row + i), most[0]);
    most[1] = larger(load_part(row + i, count - i, -INFINITY), most[1]);
    return largest_of(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

template <class T>
float sum_of_exponentials(const T* row, int64_t count, float most) {
    Floats sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= count; i += 4 * W)
        for (int j = 0; j < 4; j++) sums[j] += exponential(load_wide(row + i + j * W) - most);
    for (; i + W <= count; i += W) sums[0] += exponential(load_wide(row + i) - most);
    sums[1] += exponential(load_part(row + i, count - i, -INFINITY) - most);
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// factor * e^(x - most); a row may overwrite itself.
template <class T>
void put_exponentials(const T* row, int64_t count, float most, float factor, T* out) {
    int64_t i = 0;
    for (; i + W <= count; i += W) put(out + i, exponential(load_wide(row + i) - most) * factor);
    put_part(out + i, exponential(load_part(row + i, count - i, -INFINITY) - most) * factor, count - i);
}

struct Rows {
    int64_t count, columns, stride, out_stride;
};

template <class T>
void softmax(const T* x, const Rows& n, const float* known, float* sums, const int64_t* targets, const float* scale, const float* hit,
             T* out, int threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t row = 0; row < n.count; row++) {
        const T* from = x + row * n.stride;
        float most = known ? known[row] : largest(from, n.columns), total = 1;
        if (!known) {
            total = sum_of_exponentials(from, n.columns, most);
            sums[row] = most + std::log(total);
        }
        if (!out) continue;
        T* to = out + row * n.out_stride;
        float share = scale[row] / total, at_target = wide(from[targets[row]]);
        put_exponentials(from, n.columns, most, share, to);
        narrow(exponential(all(at_target - most))[0] * share - hit[row], to + targets[row]);
    }
}

}  // namespace

// sizes: rows, columns, and the strides of x and out; without `known` sums are written; without `out` no gradient.
extern "C" void neox_softmax(int half, const void* x, const int64_t* sizes, const float* known, float* sums, const int64_t* targets,
                             const float* scale, const float* hit, void* out, int threads) {
    Rows n{sizes[0], sizes[1], sizes[2], sizes[3]};
    if (half)
        softmax((const uint16_t*)x, n, known, sums, targets, scale, hit, (uint16_t*)out, threads);
    else
        softmax((const float*)x, n, known, sums, targets, scale, hit, (float*)out, threads);
}
