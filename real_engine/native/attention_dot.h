// Causal attention over a paged cache in bfloat16, as two small matrix products (FlashAttention, arXiv:2205.14135).
//
// A task is a few query tokens of one sequence, with all query heads of a KV head as so many rows. It walks the context
// 64 tokens at a time: keys and values are repacked into panels, as weights are, scores and sums come from the same tile
// as all other products, and the softmax runs along. A decode is a task of one query token.

#pragma once

#include "attention.h"
#include "product.h"

#ifdef HAS_DOT
namespace {

constexpr int SPAN = 64;  // context tokens at once

// Sixteen rows of sixteen 32-bit numbers become their columns.
inline void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            t[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0x88);
            t[8 * i + 4 + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0xDD);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xDD);
    }
}

// Where 64 context tokens lie, as offsets of their first head; `count` of them are there.
struct Places {
    int64_t at[SPAN];
    int count = 0;

    Places(const Paged<bf16> &a, const int32_t *blocks, int from, int reach) {
        const int size = a.block_size, width = a.kv_heads * a.dim;
        const int wanted = reach - from < SPAN ? reach - from : SPAN;
        for (int block = from / size, slot = from % size; count < wanted; block++, slot = 0)
            for (int64_t row = int64_t(blocks[block]) * size + slot; slot < size && count < wanted; slot++)
                at[count++] = row++ * width;
    }
};

// Brings near the keys and values of tokens that come next, two lines at each call: as many as there are to bring, spread
// evenly over the computing.
struct Ahead {
    const Paged<bf16> *a;
    const Places *places;
    int token = 0, line = 0;

    void operator()() {
        if (token >= places->count) return;
        const int64_t offset = places->at[token] * int64_t(sizeof(bf16)) + line;
        __builtin_prefetch((const char *)a->keys + offset, 0, 2);
        __builtin_prefetch((const char *)a->values + offset, 0, 2);
        line += LINE;
        if (line >= a->kv_heads * a->dim * int(sizeof(bf16))) line = 0, token++;
    }
};

// Keys of one head as panels [2, dim / 2, 32 tokens, 2]; tokens that aren't there are zero.
inline void pack_keys(const bf16 *keys, const Places &here, int dim, bf16 *packed) {
    for (int t0 = 0; t0 < SPAN; t0 += W)
        for (int d = 0; d < dim; d += 2 * W) {
            __m512i r[W];
            for (int t = 0; t < W; t++)
                r[t] = t0 + t < here.count ? _mm512_loadu_si512(keys + here.at[t0 + t] + d) : _mm512_setzero_si512();
            transpose(r);
            bf16 *to = packed + int64_t(t0 / PANEL) * dim * PANEL + t0 % PANEL * 2;
            for (int i = 0; i < W; i++) _mm512_storeu_si512(to + (d / 2 + i) * 2 * PANEL, r[i]);
        }
}

// Values of one head as panels [dim / 32, 32 pairs of tokens, 32, 2].
inline void pack_values(const bf16 *values, const Places &here, int dim, bf16 *packed) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                         36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int t = 0; t < SPAN; t += 2)
        for (int d = 0; d < dim; d += PANEL) {
            const __m512i none = _mm512_setzero_si512();
            const __m512i a = t < here.count ? _mm512_loadu_si512(values + here.at[t] + d) : none;
            const __m512i b = t + 1 < here.count ? _mm512_loadu_si512(values + here.at[t + 1] + d) : none;
            bf16 *to = packed + int64_t(d / PANEL) * SPAN * PANEL + t * PANEL;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(to + 2 * W, _mm512_permutex2var_epi16(a, high, b));
        }
}

// The softmax along 64 scores of one row, of which those within `low .. high` count; gives by how much what was summed
// before shrinks.
inline float soften(float *score, int low, int high, float scale, float &most, float &total, bf16 *weight) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const float nothing = -std::numeric_limits<float>::infinity();
    vec s[SPAN / W], top = all(nothing);
    for (int i = 0; i < SPAN / W; i++) {
        s[i] = load(score + i * W) * scale;
        if (low > i * W || high < (i + 1) * W) s[i] = (lane + i * W >= low) & (lane + i * W < high) ? s[i] : all(nothing);
        top = larger(top, s[i]);
    }
    const float before = most, now = largest(top);
    if (now > most) most = now;
    vec sum_ = {};
    for (int i = 0; i < SPAN / W; i++) {
        vec w = exp_negative(s[i] - most);
        if (low > i * W || high < (i + 1) * W) w = (lane + i * W >= low) & (lane + i * W < high) ? w : vec{};
        sum_ += w;
        store_rounded(weight + i * W, w);
    }
    const float shrink = now > before ? std::exp(before - now) : 1.0f;
    total = total * shrink + sum(sum_);
    return shrink;
}

// The task, and what its last part can bring near of the one that this thread takes next (if any).
void attend_dot(const Paged<bf16> &a, const Task &task, const Task *soon) {
    const auto [sequence, first, tokens, from_head, to_head] = task;
    const int dim = a.dim, group = a.heads / a.kv_heads, rows = tokens * group, heads = to_head - from_head;
    const int begin = a.starts[sequence], length = a.lengths[sequence];
    const int before = length - (a.starts[sequence + 1] - begin);  // tokens of the sequence before this step's
    const int32_t *blocks = a.table + sequence * a.table_stride;
    thread_local std::vector<vec> memory;  // vectors, for their alignment
    const size_t sums = size_t(heads) * rows * dim, scores = size_t(rows) * SPAN;
    memory.resize((sums + scores + 3 * size_t(heads) * rows) / W + (sums + scores + 2 * size_t(SPAN) * dim) / (2 * W) + 8);
    float *acc = (float *)memory.data();         // [heads, rows, dim]
    float *score = acc + sums;                   // [rows, SPAN]
    bf16 *query = (bf16 *)(score + scores);      // [heads, rows, dim]
    bf16 *key = query + sums;
    bf16 *value = key + SPAN * dim;
    bf16 *weight = value + SPAN * dim;           // [rows, SPAN]
    float *most = (float *)(weight + scores);    // [heads, rows]
    float *total = most + heads * rows;
    float *shrink = total + heads * rows;
    std::memset(acc, 0, sums * sizeof(float));
    for (int i = 0; i < heads * rows; i++) {
        const int head = from_head + i / rows, r = i % rows;
        const bf16 *q = a.q + (begin + first + r / group) * a.q_stride + int64_t(head * group + r % group) * dim;
        std::memcpy(query + int64_t(i) * dim, q, dim * sizeof(bf16));
        most[i] = -std::numeric_limits<float>::infinity();
        total[i] = 0;
    }
    const int reach = before + first + tokens;  // tokens that the last row attends to
    const int start = a.window && before + first + 1 > a.window ? (before + first + 1 - a.window) / SPAN * SPAN : 0;
    Places next(a, blocks, start, reach);
    for (int from = start; from < reach; from += SPAN) {
        const Places here = next;
        if (from + SPAN < reach || !soon)
            next = Places(a, blocks, from + SPAN, reach);
        else
            next = Places(a, a.table + soon->sequence * a.table_stride, 0, a.lengths[soon->sequence]);
        Ahead ahead = {&a, &next};
        const auto near = [&](int, auto compute) {
            if (heads == a.kv_heads)
                compute(ahead);
            else
                compute(Nothing{});  // others read the same lines
        };
        for (int h = 0; h < heads; h++) {
            const int64_t shift = int64_t(from_head + h) * dim;
            pack_keys(a.keys + shift, here, dim, key);
            pack_values(a.values + shift, here, dim, value);
            for (int p = 0; p < SPAN / PANEL; p++) {
                const char *const panel[1] = {(const char *)(key + p * PANEL * dim)};
                const char *q = (const char *)(query + int64_t(h) * rows * dim);
                all_rows<Bf16, 1>(rows, q, dim * sizeof(bf16), panel, dim / 2, near, [&](int r, const vec *c) {
                    store(score + r * SPAN + p * PANEL, c[0]);
                    store(score + r * SPAN + p * PANEL + W, c[1]);
                });
            }
            for (int r = 0; r < rows; r++) {
                const int high = before + first + r / group + 1 - from;  // causal
                const int low = a.window ? high - a.window : 0, i = h * rows + r;
                if (high > 0) {
                    shrink[r] = soften(score + r * SPAN, low, high, a.scale, most[i], total[i], weight + r * SPAN);
                } else {
                    shrink[r] = 1;
                    std::memset(weight + r * SPAN, 0, SPAN * sizeof(bf16));
                }
            }
            for (int d = 0; d < dim; d += PANEL) {
                const char *const panel[1] = {(const char *)(value + d * SPAN)};
                const char *weights = (const char *)weight;
                all_rows<Bf16, 1>(rows, weights, SPAN * sizeof(bf16), panel, SPAN / 2, near, [&](int r, const vec *c) {
                    float *to = acc + (int64_t(h) * rows + r) * dim + d;
                    store(to, load(to) * shrink[r] + c[0]);
                    store(to + W, load(to + W) * shrink[r] + c[1]);
                });
            }
        }
    }
    for (int i = 0; i < heads * rows; i++) {
        const int head = from_head + i / rows, r = i % rows;
        bf16 *out = a.out + (int64_t(begin + first + r / group) * a.heads + head * group + r % group) * dim;
        for (int d = 0; d < dim; d += W) store_rounded(out + d, load(acc + int64_t(i) * dim + d) / total[i]);
    }
}

template <>
void attend_task(const Paged<bf16> &a, const Task &task, const Task *soon) {
    if (a.dim % PANEL == 0) return attend_dot(a, task, soon);
    if (a.starts[task.sequence + 1] - a.starts[task.sequence] == 1)
        return decode_any(a, task.sequence, task.from_head, task.to_head);
    prefill<bf16, 0>(a, task.sequence, task.from_head, task.first, task.tokens);
}

}  // namespace
#endif
