// Gated activations of an MLP, forward and backward in one pass over the memory, in fp32.
// Python's side, shapes and checks: ../cpp_activations.py.

#include <cstdint>

#include "vectors.h"

namespace {

inline Floats absolute(Floats x) { return larger(x, -x); }

struct Pair {
    Floats value, slope;
};

// The normal distribution: 0.5 erfc(-x / sqrt 2) = e^(-x²/2) g(|x|) for x < 0, g being a polynomial in 1 / (1 + 0.3 |x|)
// that was fitted to it, relative error below 4e-7.
inline Pair gelu(Floats x) {
    Floats size = absolute(x), t = 1.0f / (size * 0.3f + 1.0f), bell = exponential(x * x * -0.5f);
    Floats g = all(3.8378313258e-02f);
    g = g * t - 1.6916622029e-01f;
    g = g * t + 2.2866029110e-01f;
    g = g * t - 7.6506699941e-02f;
    g = g * t + 1.4253566494e-01f;
    g = g * t + 9.4683468990e-02f;
    g = g * t + 1.2192035446e-01f;
    g = g * t + 1.1948768745e-01f;
    g = g * t + 7.1689513398e-06f;
    Floats tail = g * bell, share = x < Floats{} ? tail : 1.0f - tail;
    return {x * share, share + x * bell * 0.3989422804014327f};
}

inline Floats logistic(Floats x) {
    Floats e = exponential(-absolute(x)), whole = 1.0f / (e + 1.0f);
    return x < Floats{} ? e * whole : whole;
}

inline Pair silu(Floats x) {
    Floats s = logistic(x);
    return {x * s, s * (x * (1.0f - s) + 1.0f)};
}

inline Pair sigmoid(Floats x) {
    Floats s = logistic(x);
    return {s, s * (1.0f - s)};
}

inline Pair quick_gelu(Floats x) {
    Floats s = logistic(x * 1.702f);
    return {x * s, s * (x * 1.702f * (1.0f - s) + 1.0f)};
}

inline Pair relu(Floats x) { return {larger(Floats{}, x), x <= Floats{} ? Floats{} : all(1.0f)}; }

typedef Pair (*Function)(Floats);

constexpr int64_t CHUNK = 64 * W;  // numbers of one task
constexpr int64_t FEW = 1 << 14;   // numbers that one thread computes faster than several

// x is [rows, 2 width], a factor and a gate; without dy y [rows, width] is written, else dx.
template <Function F, class T>
void apply(const T* x, const T* dy, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * width > FEW)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t chunk = 0; chunk < width; chunk += CHUNK)
            for (int64_t at = chunk; at < std::min(chunk + CHUNK, width); at += W) {
                int64_t count = std::min<int64_t>(W, width - at), first = row * 2 * width + at, second = first + width;
                Floats factor = read(x + first, count);
                Pair gate = F(read(x + second, count));
                if (!dy) {
                    write(out + row * width + at, factor * gate.value, count);
                    continue;
                }
                Floats gradient = read(dy + row * width + at, count);
                write(out + first, gradient * gate.value, count);
                write(out + second, gradient * factor * gate.slope, count);
            }
}

template <class T>
void apply_any(int kind, const T* x, const T* dy, T* out, int64_t rows, int64_t width, int threads) {
    switch (kind) {
        case 0: return apply<gelu>(x, dy, out, rows, width, threads);
        case 1: return apply<silu>(x, dy, out, rows, width, threads);
        case 2: return apply<sigmoid>(x, dy, out, rows, width, threads);
        case 3: return apply<relu>(x, dy, out, rows, width, threads);
        default: return apply<quick_gelu>(x, dy, out, rows, width, threads);
    }
}

}  // namespace

extern "C" void neox_activation(int half, int kind, const void* x, const void* dy, void* out, int64_t rows, int64_t width,
                                int threads) {
    if (half)
        apply_any(kind, (const uint16_t*)x, (const uint16_t*)dy, (uint16_t*)out, rows, width, threads);
    else
        apply_any(kind, (const float*)x, (const float*)dy, (float*)out, rows, width, threads);
}
