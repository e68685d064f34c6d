// Sixteen floats at a time: loads and stores, sums, the exponential.
//
// Vector extensions of GCC and Clang instead of intrinsics; what the target lacks, the compiler makes of narrower
// instructions. Tensors are float or bfloat16 (the upper half of a float). All arithmetic is in float.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int W = 16;  // floats in a vector, and context tokens handled at once

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));

struct bf16 {
    uint16_t bits;
};

inline vec load(const float *p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline vec load(const bf16 *p) {
    hvec h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

inline void store(float *p, vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16 *p, vec v) {
    uvec u = (uvec)v;
    u += 0x7FFFu + ((u >> 16) & 1u);  // to nearest, ties to even; a NaN is somebody else's bug already
    hvec h = __builtin_convertvector(u >> 16, hvec);
    std::memcpy(p, &h, sizeof h);
}

inline float one(const float *p) { return *p; }
inline float one(const bf16 *p) {
    const uint32_t u = uint32_t(p->bits) << 16;
    float f;
    std::memcpy(&f, &u, sizeof f);
    return f;
}
inline void put(float *p, float f) { *p = f; }
inline void put(bf16 *p, float f) {
    uint32_t u;
    std::memcpy(&u, &f, sizeof u);
    p->bits = uint16_t((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

inline vec all(float x) { return x - vec{}; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// Both fold a vector in half four times; element by element they would cost as much as the attention itself.
inline float sum(vec v) {
    v += __builtin_shuffle(v, ivec{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, ivec{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, ivec{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    v += __builtin_shuffle(v, ivec{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    return v[0];
}

inline float largest(vec v) {
    v = larger(v, __builtin_shuffle(v, ivec{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
    v = larger(v, __builtin_shuffle(v, ivec{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
    v = larger(v, __builtin_shuffle(v, ivec{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
    v = larger(v, __builtin_shuffle(v, ivec{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
    return v[0];
}

// e^x for x <= 0 (a softmax never needs more), relative error 2e-7: x = n ln 2 + r, a polynomial in r, 2^n by bits.
inline vec exp_negative(vec x) {
    x = larger(x, all(-87.0f));
    const vec shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec n = x * 1.44269504f + shift - shift;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)power;
}

// Sums of 16 vectors at once: lane i of the result is the sum of r[i].
inline vec sums(vec *r) {
    const ivec a1 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const ivec b1 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
    const ivec a2 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    const ivec b2 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
    const ivec a3 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const ivec b3 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    const ivec a4 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    const ivec b4 = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
    for (int i = 0; i < 8; i++) r[i] = __builtin_shuffle(r[i], r[i + 8], a1) + __builtin_shuffle(r[i], r[i + 8], b1);
    for (int i = 0; i < 4; i++) r[i] = __builtin_shuffle(r[i], r[i + 4], a2) + __builtin_shuffle(r[i], r[i + 4], b2);
    for (int i = 0; i < 2; i++) r[i] = __builtin_shuffle(r[i], r[i + 2], a3) + __builtin_shuffle(r[i], r[i + 2], b3);
    return __builtin_shuffle(r[0], r[1], a4) + __builtin_shuffle(r[0], r[1], b4);
}

inline vec silu(vec x) {
    const vec e = exp_negative(x < 0 ? x : -x);  // e^-|x|
    return x * (x < 0 ? e : all(1.0f)) / (1.0f + e);
}

constexpr int LINE = 64;  // bytes that memory gives at once

}  // namespace
