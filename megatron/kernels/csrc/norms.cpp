// Root mean square norm of rows, alone and of a residual sum, forward and backward in one pass each, in fp32.
// Python's side, shapes and checks: ../cpp_norms.py.

#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t ROWS = 32;  // of a part of the scale's gradient, whatever the number of threads

inline int64_t part_of(int64_t at, int64_t width) { return std::min<int64_t>(W, width - at); }

// total = residual + x, rounded, where there is a residual; y is its norm.
template <class T>
void forward(const T* x, const T* residual, const T* scale, T* total, T* y, float* roots, int64_t rows, int64_t width, float epsilon,
             int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * width;
        if (residual) {
            T* sum = total + row * width;
            for (int64_t at = 0; at < width; at += W) {
                int64_t count = part_of(at, width);
                write(sum + at, read(from + at, count) + read(residual + row * width + at, count), count);
            }
            from = sum;
        }
        Floats squares{};
        for (int64_t at = 0; at < width; at += W) {
            Floats value = read(from + at, part_of(at, width));
            squares += value * value;
        }
        float root = 1.0f / std::sqrt(sum_of(squares) / float(width) + epsilon);
        roots[row] = root;
        for (int64_t at = 0; at < width; at += W) {
            int64_t count = part_of(at, width);
            write(y + row * width + at, read(from + at, count) * root * read(scale + at, count), count);
        }
    }
}

// x is the input of the norm; the gradient of a sum, where there is one, is added to that of x.
template <class T>
void backward(const T* dy, const T* dtotal, const T* x, const T* scale, const float* roots, T* dx, float* dscale, int64_t rows,
              int64_t width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < rows; first += ROWS) {
        std::vector<float> sums(width);
        for (int64_t row = first; row < std::min(first + ROWS, rows); row++) {
            const T *given = dy + row * width, *value = x + row * width;
            float root = roots[row];
            Floats products{};
            for (int64_t at = 0; at < width; at += W) {
                int64_t count = part_of(at, width);
                Floats gradient = read(given + at, count), normed = read(value + at, count) * root;
                write(&sums[at], read(&sums[at], count) + gradient * normed, count);
                products += gradient * read(scale + at, count) * normed;
            }
            float mean = sum_of(products) / float(width);
            for (int64_t at = 0; at < width; at += W) {
                int64_t count = part_of(at, width);
                Floats scaled = read(given + at, count) * read(scale + at, count);
                Floats found = (scaled - read(value + at, count) * (root * mean)) * root;
                if (dtotal) found += read(dtotal + row * width + at, count);
                write(dx + row * width + at, found, count);
            }
        }
        std::copy(sums.begin(), sums.end(), dscale + first / ROWS * width);
    }
}

}  // namespace

extern "C" {

// tensors: x, residual or null, scale, total or null, y.
void neox_rms_norm(int half, void** tensors, float* roots, int64_t rows, int64_t width, float epsilon, int threads) {
    auto run = [&](auto* kind) {
        auto at = [&](int number) { return decltype(kind)(tensors[number]); };
        forward(at(0), at(1), at(2), at(3), at(4), roots, rows, width, epsilon, threads);
    };
    half ? run((uint16_t*)nullptr) : run((float*)nullptr);
}

// tensors: dy, the gradient of the total or null, x, scale, dx. dscale: [rows / 32 rounded up, width], parts of a sum.
void neox_rms_norm_backward(int half, void** tensors, const float* roots, float* dscale, int64_t rows, int64_t width, int threads) {
    auto run = [&](auto* kind) {
        auto at = [&](int number) { return decltype(kind)(tensors[number]); };
        backward(at(0), at(1), at(2), at(3), roots, at(4), dscale, rows, width, threads);
    };
    half ? run((uint16_t*)nullptr) : run((float*)nullptr);
}
}
