// bfloat16 as the upper half of a float, and reads of unaligned vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

template <class V, class T>
inline V load(const T* from) {
    V found;
    std::memcpy(&found, from, sizeof(V));
    return found;
}

inline float wide(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline uint16_t rounded(float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return std::isnan(x) ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Both types to and from float by one name.
inline float wide(float x) { return x; }
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, uint16_t* to) { *to = rounded(x); }

}  // namespace
