// What lies between the matrix products, row by row. Called by every thread of a team, which shares the rows out.

#pragma once

#include "vectors.h"

namespace {

// Rotates query and key heads in place, and writes keys and values to their cache slots.
template <typename T>
void rotate_and_store(T *qkv, int64_t tokens, int heads, int kv_heads, int dim, const T *cos, const T *sin,
                      const int64_t *positions, const int64_t *slots, T *keys, T *values) {
    const int rotated = heads + kv_heads, half = dim / 2;
    const int64_t stride = int64_t(rotated + kv_heads) * dim, kv = int64_t(kv_heads) * dim;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++) {
        T *row = qkv + token * stride;
        const T *c = cos + positions[token] * dim, *s = sin + positions[token] * dim;
        for (int h = 0; h < rotated; h++) {
            int d = 0;
            for (; d + W <= half; d += W) {
                T *low = row + h * dim + d, *high = low + half;
                const vec a = load(low), b = load(high);
                store(low, a * load(c + d) + b * load(s + d));  // the sign of "rotate half" is in the table
                store(high, b * load(c + half + d) + a * load(s + half + d));
            }
            for (; d < half; d++) {
                T *low = row + h * dim + d, *high = low + half;
                const float a = one(low), b = one(high);
                put(low, a * one(c + d) + b * one(s + d));
                put(high, b * one(c + half + d) + a * one(s + half + d));
            }
        }
        std::memcpy(keys + slots[token] * kv, row + int64_t(heads) * dim, kv * sizeof(T));
        std::memcpy(values + slots[token] * kv, row + int64_t(rotated) * dim, kv * sizeof(T));
    }
}

// normed = rms_norm(x) * weight, after x += added where there is something to add.
template <typename T>
void add_norm(T *x, const T *added, const T *weight, T *normed, int64_t rows, int width, float eps) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T *row = x + r * width, *out = normed + r * width;
        vec squares = {};
        for (int i = 0; i < width; i += W) {
            vec v = load(row + i);
            if (added) {
                v += load(added + r * width + i);
                store(row + i, v);
                v = load(row + i);  // as rounded, so that fused and unfused agree
            }
            squares += v * v;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / width + eps);
        for (int i = 0; i < width; i += W) store(out + i, load(row + i) * scale * load(weight + i));
    }
}

// out = silu(gate) * up, of rows [gate, up].
template <typename T>
void silu_mul(const T *gate_up, T *out, int64_t rows, int width) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = gate_up + r * 2 * width, *up = gate + width;
        for (int i = 0; i < width; i += W) store(out + r * width + i, silu(load(gate + i)) * load(up + i));
    }
}

}  // namespace
