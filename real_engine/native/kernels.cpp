// CPU kernels of the real engine: paged attention, and the small operations between matrix products.
//
// Plain C functions, called through ctypes (real_engine/native/library.py builds and loads them): no torch headers, so
// one library serves every version of torch. Vector extensions of GCC and Clang instead of intrinsics; what the
// target lacks, the compiler makes of narrower instructions.
//
// Tensors are float (F32) or bfloat16 (BF16, the upper half of a float). All arithmetic is in float.

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

constexpr int LINE = 64;  // bytes; prefetching is a macro, because gcc 12 drops a function that does nothing else
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
    for (int from = 0; from < length; from += W) {
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
                score = lane < count ? score : all(-std::numeric_limits<float>::infinity());
                const float top = largest(score);
                if (top > r.most[g]) {
                    const float shrink = std::exp(r.most[g] - top);
                    for (int d = 0; d < D; d++) r.acc[g][d] *= shrink;
                    r.total[g] *= shrink;
                    r.most[g] = top;
                }
                vec w = exp_negative(score - r.most[g]);
                w = lane < count ? w : vec{};
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
    for (int from = 0; from < reach; from += W) {
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
                if (limit <= 0) {
                    store(weight + row * W, vec{});
                    continue;
                }
                vec s = lane < limit ? score[r] : all(-std::numeric_limits<float>::infinity());
                const float top = largest(s);
                if (top > most[row]) {
                    const float shrink = std::exp(most[row] - top);
                    for (int d = 0; d < D; d++) store(acc + row * dim + d * W, load(acc + row * dim + d * W) * shrink);
                    total[row] *= shrink;
                    most[row] = top;
                }
                vec w = exp_negative(s - most[row]);
                w = lane < limit ? w : vec{};
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

template <typename T>
void attend(const Paged<T> &a, int sequences, int threads) {
    struct Task {
        int sequence, first, rows, from_head, to_head;
    };
    std::vector<Task> tasks;  // chunks first, so that no thread is left with a long one at the end
    int decodes = 0;
    for (int s = 0; s < sequences; s++) {
        const int n = a.starts[s + 1] - a.starts[s];
        decodes += n == 1;
        for (int first = 0; n > 1 && first < n; first += TILE)
            for (int head = 0; head < a.kv_heads; head++)
                tasks.push_back({s, first, n - first < TILE ? n - first : TILE, head, head + 1});
    }
    // With decodes enough for all threads, one task reads all heads of a sequence; else the heads are shared out.
    const int heads = decodes >= 4 * threads ? a.kv_heads : 1;
    for (int s = 0; s < sequences; s++)
        for (int head = 0; a.starts[s + 1] - a.starts[s] == 1 && head < a.kv_heads; head += heads)
            tasks.push_back({s, 0, 1, head, head + heads});
    const int count = int(tasks.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (count > 1)
    for (int i = 0; i < count; i++) {
        const Task &task = tasks[i];
        if (a.starts[task.sequence + 1] - a.starts[task.sequence] == 1)
            decode_any(a, task.sequence, task.from_head, task.to_head);
        else if (a.dim == 4 * W)
            prefill<T, 4>(a, task.sequence, task.from_head, task.first, task.rows);
        else
            prefill<T, 0>(a, task.sequence, task.from_head, task.first, task.rows);
    }
}

// Rotates query and key heads in place, and writes keys and values to their cache slots.
template <typename T>
void rotate_and_store(T *qkv, int64_t tokens, int heads, int kv_heads, int dim, const T *cos, const T *sin,
                      const int64_t *positions, const int64_t *slots, T *keys, T *values, int threads) {
    const int rotated = heads + kv_heads, half = dim / 2;
    const int64_t stride = int64_t(rotated + kv_heads) * dim, kv = int64_t(kv_heads) * dim;
#pragma omp parallel for num_threads(threads) if (tokens > 4)
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
void add_norm(T *x, const T *added, const T *weight, T *normed, int64_t rows, int width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 4)
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
void silu_mul(const T *gate_up, T *out, int64_t rows, int width, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 4)
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = gate_up + r * 2 * width, *up = gate + width;
        for (int i = 0; i < width; i += W) {
            const vec g = load(gate + i);
            const vec e = exp_negative(g < 0 ? g : -g);                       // e^-|g|
            const vec sigmoid = (g < 0 ? e : all(1.0f)) / (1.0f + e);
            store(out + r * width + i, g * sigmoid * load(up + i));
        }
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

#define KERNELS(T, name)                                                                                            \
    EXPORT void attend_##name(const void *q, const void *keys, const void *values, void *out,                       \
                              const int32_t *starts, const int32_t *lengths, const int32_t *table, int64_t q_stride, \
                              int64_t table_stride, int sequences, int heads, int kv_heads, int dim,                \
                              int block_size, float scale, int threads) {                                           \
        attend<T>({(const T *)q, (const T *)keys, (const T *)values, (T *)out, starts, lengths, table, q_stride,    \
                   table_stride, heads, kv_heads, dim, block_size, scale},                                          \
                  sequences, threads);                                                                              \
    }                                                                                                               \
    EXPORT void rotate_and_store_##name(void *qkv, int64_t tokens, int heads, int kv_heads, int dim,                \
                                        const void *cos, const void *sin, const int64_t *positions,                 \
                                        const int64_t *slots, void *keys, void *values, int threads) {              \
        rotate_and_store<T>((T *)qkv, tokens, heads, kv_heads, dim, (const T *)cos, (const T *)sin, positions,      \
                            slots, (T *)keys, (T *)values, threads);                                                \
    }                                                                                                               \
    EXPORT void add_norm_##name(void *x, const void *added, const void *weight, void *normed, int64_t rows,         \
                                int width, float eps, int threads) {                                                \
        add_norm<T>((T *)x, (const T *)added, (const T *)weight, (T *)normed, rows, width, eps, threads);           \
    }                                                                                                               \
    EXPORT void silu_mul_##name(const void *gate_up, void *out, int64_t rows, int width, int threads) {             \
        silu_mul<T>((const T *)gate_up, (T *)out, rows, width, threads);                                            \
    }

KERNELS(float, f32)
KERNELS(bf16, bf16)
