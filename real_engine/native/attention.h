// Causal attention over a paged cache, for any type and processor.

#pragma once

#include "vectors.h"

namespace {

template <typename T>
struct Paged {
    const T *q;        // [tokens, heads, dim], rows q_stride apart
    const T *keys;     // [blocks, block_size, kv_heads, dim]
    const T *values;
    T *out;            // [tokens, heads * dim]
    const int32_t *starts;   // [sequences + 1]
    const int32_t *lengths;  // [sequences]
    const int32_t *table;    // [sequences, table_stride]
    int64_t q_stride, table_stride;
    int heads, kv_heads, dim, block_size;
    float scale;
    int window;        // a token attends to so many, itself included; 0: to all before it

    // Where the key or value of one context token lies, as an offset into its cache.
    int64_t at(const int32_t *blocks, int position, int kv_head) const {
        int64_t row = int64_t(blocks[position / block_size]) * block_size + position % block_size;
        return (row * kv_heads + kv_head) * dim;
    }
};

// One query token: the query heads of one KV head, and what they have gathered so far. D = dim / W.
template <int D, int G>
struct Reader {
    vec query[G][D], acc[G][D];
    float most[G], total[G];
};

// A macro, because gcc 12 drops a function that does nothing else.
#define PREFETCH(p, bytes) \
    for (size_t line_ = 0; line_ < (bytes); line_ += LINE) __builtin_prefetch((const char *)(p) + line_)

// One query token of one sequence with KV heads `from_head .. to_head`. Heads are the inner loop, so that each block is
// read once and in order; what follows it is fetched meanwhile.
template <typename T, int D, int G>
void decode(const Paged<T> &a, int sequence, int from_head, int to_head) {
    const int row = a.starts[sequence], length = a.lengths[sequence];
    const int32_t *blocks = a.table + sequence * a.table_stride;
    thread_local std::vector<vec> memory;  // vectors, for their alignment
    constexpr size_t each = (sizeof(Reader<D, G>) + sizeof(vec) - 1) / sizeof(vec);
    memory.resize(each * (to_head - from_head));
    const auto reader = [&](int head) { return (Reader<D, G> *)(memory.data() + each * (head - from_head)); };
    for (int head = from_head; head < to_head; head++) {
        const T *q = a.q + row * a.q_stride + int64_t(head) * G * a.dim;
        Reader<D, G> &r = *reader(head);
        for (int g = 0; g < G; g++) {
            r.most[g] = -std::numeric_limits<float>::infinity();
            r.total[g] = 0;
            for (int d = 0; d < D; d++) r.query[g][d] = load(q + g * a.dim + d * W) * a.scale, r.acc[g][d] = vec{};
        }
    }
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const size_t wide = size_t(to_head - from_head) * a.dim * sizeof(T);
    int64_t offset[W];
    const int seen = a.window && length > a.window ? length - a.window : 0;  // the first token attended to
    for (int from = seen / W * W; from < length; from += W) {
        const int count = length - from < W ? length - from : W;
        for (int t = 0; t < W; t++) {
            offset[t] = t < count ? a.at(blocks, from + t, from_head) : offset[0];
            if (from + W + t < length) {
                const int64_t next = a.at(blocks, from + W + t, from_head);
                PREFETCH(a.keys + next, wide);
                PREFETCH(a.values + next, wide);
            }
        }
        for (int head = from_head; head < to_head; head++) {
            Reader<D, G> &r = *reader(head);
            const int64_t shift = int64_t(head - from_head) * a.dim;
            vec partial[G][W];
            for (int t = 0; t < W; t++) {
                const T *key = a.keys + offset[t] + shift;
                for (int g = 0; g < G; g++) partial[g][t] = vec{};
                for (int d = 0; d < D; d++) {
                    const vec k = load(key + d * W);
                    for (int g = 0; g < G; g++) partial[g][t] += r.query[g][d] * k;
                }
            }
            float weight[G][W];
            for (int g = 0; g < G; g++) {
                vec score = sums(partial[g]);
                const ivec there = (lane < count) & (lane + from >= seen);
                score = there ? score : all(-std::numeric_limits<float>::infinity());
                const float top = largest(score);
                if (top > r.most[g]) {
                    const float shrink = std::exp(r.most[g] - top);
                    for (int d = 0; d < D; d++) r.acc[g][d] *= shrink;
                    r.total[g] *= shrink;
                    r.most[g] = top;
                }
                vec w = exp_negative(score - r.most[g]);
                w = there ? w : vec{};
                r.total[g] += sum(w);
                store(weight[g], w);
            }
            for (int t = 0; t < count; t++) {
                const T *value = a.values + offset[t] + shift;
                for (int d = 0; d < D; d++) {
                    const vec v = load(value + d * W);
                    for (int g = 0; g < G; g++) r.acc[g][d] += weight[g][t] * v;
                }
            }
        }
    }
    for (int head = from_head; head < to_head; head++) {
        const Reader<D, G> &r = *reader(head);
        T *out = a.out + (int64_t(row) * a.heads + head * G) * a.dim;
        for (int g = 0; g < G; g++)
            for (int d = 0; d < D; d++) store(out + g * a.dim + d * W, r.acc[g][d] / r.total[g]);
    }
}

// A tile of query tokens of one sequence, one KV head: keys are widened and transposed once for the whole tile.
// Scores come out as [rows, 16 tokens], six rows at a time, without a horizontal sum.
constexpr int TILE = 32;  // query tokens

// acc += weight x value for R rows: weight [R, W], value [W, D * W].
template <int R>
inline void gather(float *acc, const float *weight, const float *value, int D, int count) {
    const int dim = D * W;
    for (int d = 0; d < D; d++) {
        vec o[R];
        for (int r = 0; r < R; r++) o[r] = load(acc + r * dim + d * W);
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) {
            const vec v = load(value + t * dim + d * W);
            for (int r = 0; r < R; r++) o[r] += v * weight[r * W + t];
        }
        for (int r = 0; r < R; r++) store(acc + r * dim + d * W, o[r]);
    }
}

template <typename T, int KNOWN>
void prefill(const Paged<T> &a, int sequence, int kv_head, int first, int rows_q) {
    const int D = KNOWN ? KNOWN : a.dim / W, dim = D * W, group = a.heads / a.kv_heads;
    const int begin = a.starts[sequence], length = a.lengths[sequence];
    const int before = length - (a.starts[sequence + 1] - begin);  // tokens of the sequence before this step's
    const int32_t *blocks = a.table + sequence * a.table_stride;
    const int rows = rows_q * group;
    thread_local std::vector<float> memory;
    memory.resize(size_t(rows) * (2 * dim + 2 + W) + 2 * size_t(W) * dim + 8 * W);
    float *query = memory.data();        // [rows, dim]
    float *acc = query + rows * dim;     // [rows, dim]
    float *most = acc + rows * dim;      // [rows]
    float *total = most + rows;          // [rows]
    float *weight = total + rows;        // [rows, W]
    float *key = weight + rows * W;      // [dim, W]
    float *value = key + dim * W;        // [W, dim]
    for (int r = 0; r < rows; r++) {
        const T *q = a.q + (begin + first + r / group) * a.q_stride + int64_t(kv_head * group + r % group) * dim;
        for (int d = 0; d < D; d++) {
            store(query + r * dim + d * W, load(q + d * W) * a.scale);
            store(acc + r * dim + d * W, vec{});
        }
        most[r] = -std::numeric_limits<float>::infinity();
        total[r] = 0;
    }
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int reach = before + first + rows_q;  // tokens that the tile's last row attends to
    const int seen = a.window && before + first + 1 > a.window ? before + first + 1 - a.window : 0;
    for (int from = seen / W * W; from < reach; from += W) {
        const int count = reach - from < W ? reach - from : W;
        for (int t = 0; t < W; t++) {
            const int64_t offset = a.at(blocks, from + (t < count ? t : 0), kv_head);
            for (int d = 0; d < D; d++) {
                const vec k = load(a.keys + offset + d * W);
                for (int i = 0; i < W; i++) key[(d * W + i) * W + t] = k[i];
                store(value + t * dim + d * W, load(a.values + offset + d * W));
            }
        }
        for (int r0 = 0; r0 < rows; r0 += 6) {
            const int n = rows - r0 < 6 ? rows - r0 : 6;
            vec score[6] = {};
            if (n == 6) {
#pragma GCC unroll 4
                for (int d = 0; d < dim; d++) {
                    const vec k = load(key + d * W);
                    for (int r = 0; r < 6; r++) score[r] += k * query[(r0 + r) * dim + d];
                }
            } else {
                for (int d = 0; d < dim; d++) {
                    const vec k = load(key + d * W);
                    for (int r = 0; r < n; r++) score[r] += k * query[(r0 + r) * dim + d];
                }
            }
            for (int r = 0; r < n; r++) {
                const int row = r0 + r, limit = before + first + row / group + 1 - from;  // causal
                const int low = a.window ? limit - a.window : 0;
                if (limit <= 0 || low >= W) {
                    store(weight + row * W, vec{});
                    continue;
                }
                const ivec there = (lane < limit) & (lane >= low);
                vec s = there ? score[r] : all(-std::numeric_limits<float>::infinity());
                const float top = largest(s);
                if (top > most[row]) {
                    const float shrink = std::exp(most[row] - top);
                    for (int d = 0; d < D; d++) store(acc + row * dim + d * W, load(acc + row * dim + d * W) * shrink);
                    total[row] *= shrink;
                    most[row] = top;
                }
                vec w = exp_negative(s - most[row]);
                w = there ? w : vec{};
                total[row] += sum(w);
                store(weight + row * W, w);
            }
        }
        int r0 = 0;
        for (; r0 + 4 <= rows; r0 += 4) gather<4>(acc + r0 * dim, weight + r0 * W, value, D, count);
        for (; r0 < rows; r0++) gather<1>(acc + r0 * dim, weight + r0 * W, value, D, count);
    }
    for (int r = 0; r < rows; r++) {
        T *out = a.out + (int64_t(begin + first + r / group) * a.heads + kv_head * group + r % group) * dim;
        for (int d = 0; d < D; d++) store(out + d * W, load(acc + r * dim + d * W) / total[r]);
    }
}

template <typename T>
void decode_any(const Paged<T> &a, int sequence, int from_head, int to_head) {
    const int D = a.dim / W, G = a.heads / a.kv_heads;
    if (D == 4 && G == 1) return decode<T, 4, 1>(a, sequence, from_head, to_head);
    if (D == 4 && G == 2) return decode<T, 4, 2>(a, sequence, from_head, to_head);
    if (D == 4 && G == 3) return decode<T, 4, 3>(a, sequence, from_head, to_head);
    if (D == 4 && G == 4) return decode<T, 4, 4>(a, sequence, from_head, to_head);
    if (D == 8 && G == 1) return decode<T, 8, 1>(a, sequence, from_head, to_head);
    if (D == 8 && G == 2) return decode<T, 8, 2>(a, sequence, from_head, to_head);
    for (int head = from_head; head < to_head; head++) prefill<T, 0>(a, sequence, head, 0, 1);
}

struct Task {
    int sequence, first, tokens, from_head, to_head;
};

// A step's attention in pieces for threads to take; the long ones first, so that no thread is left with one at the end.
std::vector<Task> tasks(const int32_t *starts, int sequences, int kv_heads, int threads) {
    std::vector<Task> all_;
    int decodes = 0;
    for (int s = 0; s < sequences; s++) {
        const int n = starts[s + 1] - starts[s];
        decodes += n == 1;
        for (int first = 0; n > 1 && first < n; first += TILE)
            for (int head = 0; head < kv_heads; head++)
                all_.push_back({s, first, n - first < TILE ? n - first : TILE, head, head + 1});
    }
    // With decodes enough for all threads, one task reads all heads of a sequence; else the heads are shared out.
    const int heads = decodes >= 4 * threads ? kv_heads : 1;
    for (int s = 0; s < sequences; s++)
        for (int head = 0; starts[s + 1] - starts[s] == 1 && head < kv_heads; head += heads)
            all_.push_back({s, 0, 1, head, head + heads});
    return all_;
}

template <typename T>
void attend_task(const Paged<T> &a, const Task &task, const Task *) {
    if (a.starts[task.sequence + 1] - a.starts[task.sequence] == 1)
        decode_any(a, task.sequence, task.from_head, task.to_head);
    else if (a.dim == 4 * W)
        prefill<T, 4>(a, task.sequence, task.from_head, task.first, task.tokens);
    else
        prefill<T, 0>(a, task.sequence, task.from_head, task.first, task.tokens);
}

// Called by every thread of a team. Each takes a task ahead of the one it works on, so that it can fetch for it; `taken`
// counts them and starts at 0.
template <typename T>
void attend_all(const Paged<T> &a, const std::vector<Task> &todo, int &taken) {
    const auto take = [&] {
        int mine;
#pragma omp atomic capture
        mine = taken++;
        return mine;
    };
    const int count = int(todo.size());
    for (int now = take(); now < count;) {
        const int soon = take();
        attend_task(a, todo[now], soon < count ? &todo[soon] : nullptr);
        now = soon;
    }
#pragma omp barrier
}

}  // namespace
