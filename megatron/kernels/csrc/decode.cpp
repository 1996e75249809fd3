// Attention of one new position a text on a processor, as each step of decoding needs it: its query and key are turned
// (rotary positions), key and value join the cache, and the query attends to all that is there.
//
// Keys and values are read once, in order, and little is done with them, so it is as fast as memory when several sums are
// kept in registers. Sums and softmax are fp32. Python's side, shapes and checks: ../decode_attention.py.
//
// Vectors are GCC's and Clang's vector extensions, 16 floats wide, which any processor has in some form; the one
// instruction used by name is the dot product of bfloat16 pairs, with a twin for processors without it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int W = 16;  // floats of a vector
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// STEP elements of two rows: their products, added to 16 sums.
template <class T>
struct Dot;

template <>
struct Dot<float> {
    static constexpr int STEP = W;
    typedef Floats Part;
    static inline Part part(const float* from) { return load<Floats>(from); }
    static inline void add(Floats& sum, Part a, Part b) { sum += a * b; }
};

template <>
struct Dot<uint16_t> {
    static constexpr int STEP = 2 * W;
#if defined(__AVX512BF16__)
    typedef __m512bh Part;
    static inline Part part(const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }
    static inline void add(Floats& sum, Part a, Part b) { sum = (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
    typedef Words Part;
    static inline Part part(const uint16_t* from) { return load<Words>(from); }
    static inline void add(Floats& sum, Part a, Part b) {
        sum += (Floats)(a << 16) * (Floats)(b << 16);
        sum += (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
    }
#endif
};

// 16 floats of a row of keys or values.
inline Floats widened(const float* from) { return load<Floats>(from); }
inline Floats widened(const uint16_t* from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// Sums of neighbours: the first half of the result from a, the second from b.
inline Floats neighbours(Floats a, Floats b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// The sums over each of N vectors, in the first N places.
template <int N>
inline Floats totals(const Floats* sums) {
    const Floats zero = {};
    Floats level[16];
    for (int at = 0; at < 16; at++) level[at] = at < N ? sums[at] : zero;
    for (int count = 8; count >= 1; count /= 2)
        for (int at = 0; at < count; at++) level[at] = neighbours(level[2 * at], level[2 * at + 1]);
    return level[0];
}

// Products of one row of k elements with N rows, which lie `stride` apart.
template <class T, int N>
inline void products(const T* x, const T* rows, int64_t stride, int64_t k, float* found) {
    typedef Dot<T> D;
    Floats sums[N] = {};
    int64_t at = 0;
    for (; at + D::STEP <= k; at += D::STEP) {
        const typename D::Part part = D::part(x + at);
        for (int n = 0; n < N; n++) D::add(sums[n], D::part(rows + n * stride + at), part);
    }
    const Floats all = totals<N>(sums);
    std::memcpy(found, &all, 4 * N);
    for (; at < k; at++)
        for (int n = 0; n < N; n++) found[n] += wide(x[at]) * wide(rows[n * stride + at]);
}

// exp of numbers that are not above 0 (Cephes' expf: a power of two and a polynomial; within 2 units in the last place).
inline Floats exponential(Floats x) {
    const Floats least = Floats{} - 87.0f;
    x = x < least ? least : x;
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    const Floats power = shifted - 12582912.0f;
    const Floats r = x - power * 0.693359375f + power * 2.12194440e-4f;
    Floats sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.0f;
    const Words bits = ((Words)shifted + (127u - 0x4b400000u)) << 23;  // 2^power
    return sum * (Floats)bits;
}

// One query of one head. scores: room for `count` rounded up to 16.
template <class T>
void attend_head(const T* q, const T* k, const T* v, int64_t stride, int64_t count, int64_t size, float scale,
                 float* scores, T* out) {
    int64_t at = 0;
    for (; at + 16 <= count; at += 16)
        products<T, 16>(q, k + at * stride, stride, size, scores + at);
    for (; at < count; at++) products<T, 1>(q, k + at * stride, stride, size, scores + at);
    float highest = -INFINITY;
    for (at = 0; at < count; at++) highest = scores[at] > highest ? scores[at] : highest;
    for (at = count; at % W; at++) scores[at] = -INFINITY;
    Floats sums = {};
    for (at = 0; at < count; at += W) {
        const Floats each = exponential((load<Floats>(scores + at) - highest) * scale);
        std::memcpy(scores + at, &each, sizeof(each));
    }
    for (at = count; at % W; at++) scores[at] = 0.0f;
    for (at = 0; at < count; at += W) sums += load<Floats>(scores + at);
    const Floats total = totals<1>(&sums);
    const float share = 1.0f / total[0];
    for (int64_t first = 0; first < size; first += 4 * W) {
        const int parts = size - first < 4 * W ? int(size - first) / W : 4;
        Floats found[4] = {};
        for (at = 0; at < count; at++) {
            const T* row = v + at * stride + first;
            for (int part = 0; part < 4; part++)
                if (part < parts) found[part] += scores[at] * widened(row + part * W);
        }
        for (int place = 0; place < parts * W; place++) narrow(found[place / W][place % W] * share, out + first + place);
    }
}

// A head with its first 2 * half features turned: feature i is paired with feature half + i (rotary positions).
template <class T>
void turn(const T* x, const float* cosines, const float* sines, int64_t half, int64_t size, T* to) {
    for (int64_t i = 0; i < half; i++) {
        const float a = wide(x[i]), b = wide(x[half + i]);
        narrow(a * cosines[i] - b * sines[i], to + i);
        narrow(b * cosines[i] + a * sines[i], to + half + i);
    }
    std::memcpy(to + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(T));
}

struct Sizes {
    int64_t batch, heads, group, size, half;
};

// Strides in elements: of a row and a head of q, k and v; of a row, a head and a position of the cache.
struct Strides {
    int64_t q[2], k[2], v[2], cache[3];
};

template <class T>
void decode(const T* q, const T* k, const T* v, T* keys, T* values, const float* cosines, const float* sines,
            const int64_t* ends, T* out, const Sizes& s, const Strides& strides, float scale, int threads) {
    int64_t longest = 0;
    for (int64_t row = 0; row < s.batch; row++) longest = ends[row] > longest ? ends[row] : longest;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(longest + W);
        std::vector<T> turned(s.size);
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < s.batch * s.heads; pair++) {
            const int64_t row = pair / s.heads, head = pair % s.heads, position = ends[row] - 1;
            const float *cosine = cosines + position * s.half, *sine = sines + position * s.half;
            const int64_t from = row * strides.cache[0] + head * strides.cache[1], to = from + position * strides.cache[2];
            turn(k + row * strides.k[0] + head * strides.k[1], cosine, sine, s.half, s.size, keys + to);
            std::memcpy(values + to, v + row * strides.v[0] + head * strides.v[1], s.size * sizeof(T));
            for (int64_t at = head * s.group; at < (head + 1) * s.group; at++) {
                turn(q + row * strides.q[0] + at * strides.q[1], cosine, sine, s.half, s.size, turned.data());
                attend_head(turned.data(), keys + from, values + from, strides.cache[2], ends[row], s.size, scale,
                            scores.data(), out + (row * s.heads * s.group + at) * s.size);
            }
        }
    }
}

}  // namespace

extern "C" {

// q [batch, heads * group, size], k and v [batch, heads, size] of the newest position, keys and values [batch, heads,
// positions, size] to which k and v are added, all with dense features; cosines and sines [positions, half]; out as q,
// contiguous. Row b has ends[b] positions with the newest one. sizes and strides: the members of the structs above.
void neox_decode(const void* q, const void* k, const void* v, void* keys, void* values, const float* cosines,
                 const float* sines, const int64_t* ends, void* out, const int64_t* sizes, const int64_t* strides,
                 float scale, int bfloat, int threads) {
    Sizes s;
    Strides told;
    std::memcpy(&s, sizes, sizeof(s));
    std::memcpy(&told, strides, sizeof(told));
    if (bfloat)
        decode((const uint16_t*)q, (const uint16_t*)k, (const uint16_t*)v, (uint16_t*)keys, (uint16_t*)values, cosines,
               sines, ends, (uint16_t*)out, s, told, scale, threads);
    else
        decode((const float*)q, (const float*)k, (const float*)v, (float*)keys, (float*)values, cosines, sines, ends,
               (float*)out, s, told, scale, threads);
}
}
