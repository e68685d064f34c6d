// Matrix products of bfloat16 rows with packed weights, summed in float by the processor's own dot product.
//
// A weight [outputs, inputs] is packed in panels of 32 outputs: [outputs / 32, inputs / 2, 32, 2], so that one vector
// holds two inputs of sixteen outputs, and a panel is read from memory once, in order, for all rows. What is done with
// the sums (bias, residual, gate) is done while they are in registers. The tiling is Goto's and van de Geijn's (2008).

#pragma once

#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_DOT 1
#include <immintrin.h>

namespace {

constexpr int PANEL = 32;  // outputs of a panel
constexpr int ROWS = 12;   // rows times panels computed at once: as many sums as there are registers for

inline void store_rounded(bf16 *p, vec v) {
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
}

// What is brought near while a tile computes: called once for every pair of inputs.
struct Nothing {
    void operator()() {}
};

struct Lines {
    const char *at;
    void operator()() {
        __builtin_prefetch(at);
        at += LINE;
    }
};

// sums = x times P panels, for R rows `stride` apart.
// Inlined without fail: only then do the sums stay in registers.
template <int R, int P, typename Fetch>
[[gnu::always_inline]] inline void tile(const bf16 *x, int64_t stride, const bf16 *const (&panel)[P], int inputs,
                                        vec (&sums)[R][2 * P], Fetch &fetch) {
    vec c[R][2 * P] = {};
    for (int64_t k = 0; k < inputs / 2; k++) {
        __m512bh w[2 * P];
        for (int p = 0; p < 2 * P; p++)
            w[p] = (__m512bh)_mm512_loadu_si512(panel[p / 2] + k * 2 * PANEL + p % 2 * 2 * W);
        fetch();
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, x + r * stride + 2 * k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            for (int p = 0; p < 2 * P; p++) c[r][p] = (vec)_mm512_dpbf16_ps((__m512)c[r][p], both, w[p]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < 2 * P; p++) sums[r][p] = c[r][p];
}

// `rows` <= ROWS / P rows as one tile; the number of rows of a tile must be known to the compiler.
template <int P, int R = ROWS / P, typename Fetch, typename Out>
inline void some_rows(int rows, const bf16 *x, int64_t stride, const bf16 *const (&panel)[P], int inputs, Fetch &fetch,
                      const Out &out) {
    if (rows == R) {
        vec sums[R][2 * P];
        tile(x, stride, panel, inputs, sums, fetch);
        for (int r = 0; r < R; r++) out(r, sums[r]);
    } else if constexpr (R > 1) {
        some_rows<P, R - 1>(rows, x, stride, panel, inputs, fetch, out);
    }
}

// All rows with P panels, in tiles of nearly equal height. `out(row, sums)` takes each row's 32 * P sums; `fetch(i)` says
// what tile i brings near.
template <int P, typename Fetch, typename Out>
inline void all_rows(int rows, const bf16 *x, int64_t stride, const bf16 *const (&panel)[P], int inputs,
                     const Fetch &fetch, const Out &out) {
    const int tiles = (rows + ROWS / P - 1) / (ROWS / P);
    for (int i = 0, first = 0; i < tiles; i++) {
        const int height = rows / tiles + (i < rows % tiles);
        fetch(i, [&](auto &&near) {
            some_rows<P>(height, x + first * stride, stride, panel, inputs, near,
                         [&](int r, const vec *sums) { out(first + r, sums); });
        });
        first += height;
    }
}

// While rows go through one panel, two tiles fetch the next: reading it is what everything else would wait for. A panel of
// `inputs` has two lines for each pair of them. With one tile the processor's own prefetching does as well.
inline auto next_panel(const bf16 *panel, int inputs, int rows, int most) {
    return [=](int tile, auto compute) {
        if (rows > most && tile < 2)
            compute(Lines{(const char *)panel + tile * (int64_t(inputs) / 2 * LINE)});
        else
            compute(Nothing{});
    };
}

// Called by every thread of a team, which shares the panels out: x [rows, inputs] times all panels.
template <typename Out>
void product(const bf16 *x, int rows, int inputs, const bf16 *packed, int outputs, const Out &out) {
    const int64_t size = int64_t(inputs) * PANEL;
#pragma omp for schedule(static)
    for (int n = 0; n < outputs / PANEL; n++) {
        const bf16 *const panel[1] = {packed + n * size};
        all_rows<1>(rows, x, inputs, panel, inputs, next_panel(panel[0] + size, inputs, rows, ROWS), [&](int row, const vec *sums) {
            out(row, n * PANEL, sums[0]);
            out(row, n * PANEL + W, sums[1]);
        });
    }
}

// As `product` of gate and up, packed one after the other, followed by silu(gate) * up: [rows, inner].
inline void gated_product(const bf16 *x, int rows, int inputs, const bf16 *packed, int inner, bf16 *activated) {
    const int64_t size = int64_t(inputs) * PANEL, half = size * (inner / PANEL);
#pragma omp for schedule(static)
    for (int n = 0; n < inner / PANEL; n++) {
        const bf16 *const panel[2] = {packed + n * size, packed + half + n * size};
        all_rows<2>(rows, x, inputs, panel, inputs, next_panel(panel[0] + size, inputs, rows, ROWS / 2), [&](int row, const vec *sums) {
            for (int p = 0; p < 2; p++)
                store_rounded(activated + int64_t(row) * inner + n * PANEL + p * W, silu(sums[p]) * sums[p + 2]);
        });
    }
}

}  // namespace
#endif
