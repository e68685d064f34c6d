// Matrix products of rows with packed weights, by the processor's own dot products.
//
// A weight [outputs, inputs] is packed in panels of 32 outputs: [outputs / 32, inputs / g, 32, g], where g numbers fill
// 32 bits (two of bfloat16, four of 8 bits). So one vector holds g inputs of sixteen outputs, and a panel is read from
// memory once, in order, for all rows. What is done with the sums (bias, residual, gate) is done while they are in
// registers. The tiling is Goto's and van de Geijn's (2008).

#pragma once

#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define HAS_DOT 1
#include <immintrin.h>

namespace {

constexpr int PANEL = 32;  // outputs of a panel
constexpr int ROWS = 12;   // rows times panels computed at once: as many sums as there are registers for

inline void store_rounded(bf16 *p, vec v) {
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h, sizeof h);
}

// sums += 32 bits of a row, in every lane, times those of sixteen outputs.
struct Bf16 {
    typedef vec Sums;
    static constexpr int GROUP = 2;
    static Sums add(Sums sums, __m512i x, __m512i w) {
        return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)w);
    }
};

// Unsigned rows, signed weights: what the instruction takes.
struct Int8 {
    typedef ivec Sums;
    static constexpr int GROUP = 4;
    static Sums add(Sums sums, __m512i x, __m512i w) { return (ivec)_mm512_dpbusd_epi32((__m512i)sums, x, w); }
};

// What is brought near while a tile computes: called once for every group of inputs.
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

// sums = x times P panels, for R rows `stride` bytes apart. Inlined without fail: only then do they stay in registers.
template <typename Dot, int R, int P, typename Fetch>
[[gnu::always_inline]] inline void tile(const char *x, int64_t stride, const char *const (&panel)[P], int groups,
                                        typename Dot::Sums (&sums)[R][2 * P], Fetch &fetch) {
    typename Dot::Sums c[R][2 * P] = {};
    for (int64_t k = 0; k < groups; k++) {
        __m512i w[2 * P];
        for (int p = 0; p < 2 * P; p++) w[p] = _mm512_loadu_si512(panel[p / 2] + (2 * k + p % 2) * LINE);
        fetch();
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t group;
            std::memcpy(&group, x + r * stride + 4 * k, sizeof group);
            const __m512i all_lanes = _mm512_set1_epi32(group);
            for (int p = 0; p < 2 * P; p++) c[r][p] = Dot::add(c[r][p], all_lanes, w[p]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < 2 * P; p++) sums[r][p] = c[r][p];
}

// `rows` <= ROWS / P rows as one tile; the number of rows of a tile must be known to the compiler.
template <typename Dot, int P, int R = ROWS / P, typename Fetch, typename Out>
inline void some_rows(int rows, const char *x, int64_t stride, const char *const (&panel)[P], int groups, Fetch &fetch,
                      const Out &out) {
    if (rows == R) {
        typename Dot::Sums sums[R][2 * P];
        tile<Dot>(x, stride, panel, groups, sums, fetch);
        for (int r = 0; r < R; r++) out(r, sums[r]);
    } else if constexpr (R > 1) {
        some_rows<Dot, P, R - 1>(rows, x, stride, panel, groups, fetch, out);
    }
}

// All rows with P panels, in tiles of nearly equal height. `out(row, sums)` takes each row's 32 * P sums; `fetch(i)` says
// what tile i brings near.
template <typename Dot, int P, typename Fetch, typename Out>
inline void all_rows(int rows, const char *x, int64_t stride, const char *const (&panel)[P], int groups,
                     const Fetch &fetch, const Out &out) {
    const int tiles = (rows + ROWS / P - 1) / (ROWS / P);
    for (int i = 0, first = 0; i < tiles; i++) {
        const int height = rows / tiles + (i < rows % tiles);
        fetch(i, [&](auto &&near) {
            some_rows<Dot, P>(height, x + first * stride, stride, panel, groups, near,
                              [&](int r, const typename Dot::Sums *sums) { out(first + r, sums); });
        });
        first += height;
    }
}

// While rows go through P panels, two tiles fetch the one after each: reading it is what everything else would wait for.
// A panel has two lines for each group of inputs. With one tile the processor's own prefetching does as well.
template <int P>
inline auto next_panels(const char *const (&panel)[P], int groups, int rows) {
    return [=, &panel](int tile, auto compute) {
        if (rows > ROWS / P && tile < 2 * P)
            compute(Lines{panel[tile / 2] + (2 + tile % 2) * int64_t(groups) * LINE});
        else
            compute(Nothing{});
    };
}

// Rows to multiply: bfloat16, or 8 bits (plus 128) with a scale for each row.
struct Operand {
    const void *rows;
    const float *scale;
};

// A packed weight: bfloat16, or 8 bits with a scale for each output, and 128 times each output's sum.
struct Weight {
    const void *panels;
    const float *scale;
    const int32_t *shift;
};

template <typename Dot>
inline vec real(const Operand &x, const Weight &w, int row, int column, typename Dot::Sums sums) {
    if constexpr (Dot::GROUP == 2) {
        return sums;
    } else {
        ivec shift;
        std::memcpy(&shift, w.shift + column, sizeof shift);
        return __builtin_convertvector(sums - shift, vec) * load(w.scale + column) * x.scale[row];
    }
}

// P columns of panels, `apart` outputs from each other, for all rows. Called by every thread of a team, which shares the
// panels out. `out(row, column, values)` takes 2 * P vectors: outputs `column ..` of each of the P.
template <typename Dot, int P, typename Out>
void panels(const Operand &x, int rows, int inputs, const Weight &w, int apart, const Out &out) {
    const int groups = inputs / Dot::GROUP;
    const int64_t size = int64_t(groups) * 2 * LINE;
#pragma omp for schedule(static)
    for (int n = 0; n < apart / PANEL; n++) {
        const char *panel[P];
        for (int p = 0; p < P; p++) panel[p] = (const char *)w.panels + (n + p * (apart / PANEL)) * size;
        const char *const(&fixed)[P] = (const char *const(&)[P])panel;
        all_rows<Dot, P>(rows, (const char *)x.rows, 4 * int64_t(groups), fixed, groups, next_panels<P>(fixed, groups, rows),
                         [&](int row, const typename Dot::Sums *sums) {
                             vec values[2 * P];
                             for (int p = 0; p < 2 * P; p++)
                                 values[p] = real<Dot>(x, w, row, n * PANEL + p / 2 * apart + p % 2 * W, sums[p]);
                             out(row, n * PANEL, values);
                         });
    }
}

// x [rows, inputs] times a weight; `out(row, column, values)` takes sixteen outputs.
template <typename Out>
void product(const Operand &x, int rows, int inputs, const Weight &w, int outputs, const Out &out) {
    const auto both = [&](int row, int column, const vec *values) {
        out(row, column, values[0]);
        out(row, column + W, values[1]);
    };
    if (w.scale)
        panels<Int8, 1>(x, rows, inputs, w, outputs, both);
    else
        panels<Bf16, 1>(x, rows, inputs, w, outputs, both);
}

// As `product` of gate and up, packed one after the other, followed by silu(gate) * up: [rows, inner].
inline void gated_product(const Operand &x, int rows, int inputs, const Weight &w, int inner, bf16 *activated) {
    const auto gate = [&](int row, int column, const vec *values) {
        bf16 *to = activated + int64_t(row) * inner + column;
        for (int p = 0; p < 2; p++) store_rounded(to + p * W, silu(values[p]) * values[p + 2]);
    };
    if (w.scale)
        panels<Int8, 2>(x, rows, inputs, w, inner, gate);
    else
        panels<Bf16, 2>(x, rows, inputs, w, inner, gate);
}

// Each row as 8 bits, plus 128, with a scale of its own. Called by every thread of a team.
inline void quantize(const bf16 *x, int rows, int width, uint8_t *bytes, float *scale) {
#pragma omp for schedule(static)
    for (int r = 0; r < rows; r++) {
        const bf16 *row = x + int64_t(r) * width;
        vec most = {};
        for (int i = 0; i < width; i += W) {
            const vec v = load(row + i);
            most = larger(most, larger(v, -v));
        }
        const float top = largest(most);
        scale[r] = top / 127.0f;
        const vec inverse = all(top > 0 ? 127.0f / top : 0.0f);
        for (int i = 0; i < width; i += W) {
            const __m512i rounded = _mm512_cvtps_epi32((__m512)(load(row + i) * inverse));
            const __m128i packed = _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, _mm512_set1_epi32(128)));
            std::memcpy(bytes + int64_t(r) * width + i, &packed, sizeof packed);
        }
    }
}

}  // namespace
#endif
