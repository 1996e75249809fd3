// Rotary positions of full sequences in one pass: pairs of features turn by the angle of their position.
// Python's side, shapes and checks: ../rotary.py.

#include <cstdint>
#include <cstring>

#include "bfloat16.h"

namespace {

// n: batch, heads, length, size, half; s: strides of x by batch, head and position, and of the tables by batch.
template <class T>
void rotate(const T* x, T* out, const int64_t* n, const int64_t* s, const float* cosines, const float* sines, float sign, int threads) {
    int64_t length = n[2], size = n[3], half = n[4];
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t row = 0; row < n[0] * n[1]; row++)
        for (int64_t position = 0; position < length; position++) {
            int64_t batch = row / n[1], head = row % n[1];
            const T* from = x + batch * s[0] + head * s[1] + position * s[2];
            T* to = out + (row * length + position) * size;
            const float *c = cosines + batch * s[3] + position * half, *d = sines + batch * s[3] + position * half;
            for (int64_t i = 0; i < half; i++) {
                float first = wide(from[i]), second = wide(from[half + i]), sine = sign * d[i];
                narrow(first * c[i] - second * sine, to + i);
                narrow(second * c[i] + first * sine, to + half + i);
            }
            std::memcpy(to + 2 * half, from + 2 * half, (size - 2 * half) * sizeof(T));
        }
}

}  // namespace

extern "C" void neox_rotary(int narrow_type, const void* x, void* out, const int64_t* sizes, const int64_t* strides, const float* cosines,
                            const float* sines, float sign, int threads) {
    if (narrow_type)
        rotate((const uint16_t*)x, (uint16_t*)out, sizes, strides, cosines, sines, sign, threads);
    else
        rotate((const float*)x, (float*)out, sizes, strides, cosines, sines, sign, threads);
}
