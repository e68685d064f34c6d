// The C interface of the CPU kernels; real_engine/native/library.py builds this file and calls it through ctypes.
//
// No torch headers, so one library serves every version of torch. vectors.h: sixteen floats at a time. elementwise.h:
// norms, rotation, gate. attention.h: attention for any type and processor. Where the processor multiplies bfloat16
// itself: product.h (matrix products with packed weights), attention_dot.h (attention made of them), stack.h (all
// layers in one call).

#include "attention_dot.h"
#include "elementwise.h"
#include "stack.h"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define TEAM _Pragma("omp parallel num_threads(threads) if (rows > 4)")

#define KERNELS(T, name)                                                                                              \
    EXPORT void attend_##name(const void *q, const void *keys, const void *values, void *out, const int32_t *starts,  \
                              const int32_t *lengths, const int32_t *table, int64_t q_stride, int64_t table_stride,   \
                              int sequences, int heads, int kv_heads, int dim, int block_size, float scale,           \
                              int window, int threads) {                                                              \
        const Paged<T> a = {(const T *)q, (const T *)keys, (const T *)values, (T *)out, starts, lengths, table,       \
                            q_stride, table_stride, heads, kv_heads, dim, block_size, scale, window};                 \
        const std::vector<Task> todo = tasks(starts, sequences, kv_heads, threads);                                   \
        int taken = 0;                                                                                                \
        _Pragma("omp parallel num_threads(threads) if (todo.size() > 1)") attend_all(a, todo, taken);                 \
    }                                                                                                                 \
    EXPORT void rotate_and_store_##name(void *qkv, int64_t rows,   int heads, int kv_heads, int dim, const void *cos, \
                                        const void *sin, const int64_t *positions, const int64_t *slots, void *keys,  \
                                        void *values, int threads) {                                                  \
        TEAM                                                                                                          \
        rotate_and_store<T>((T *)qkv, rows, heads, kv_heads, dim, (const T *)cos, (const T *)sin, positions, slots, \
                            (T *)keys, (T *)values);                                                                  \
    }                                                                                                                 \
    EXPORT void add_norm_##name(void *x, const void *added, const void *weight, void *normed, int64_t rows, int width, \
                                float eps, int threads) {                                                             \
        TEAM                                                                                                          \
        add_norm<T>((T *)x, (const T *)added, (const T *)weight, (T *)normed, rows, width, eps);                      \
    }                                                                                                                 \
    EXPORT void silu_mul_##name(const void *gate_up, void *out, int64_t rows, int width, int threads) {               \
        TEAM                                                                                                          \
        silu_mul<T>((const T *)gate_up, (T *)out, rows, width);                                                       \
    }

KERNELS(float, f32)
KERNELS(bf16, bf16)

#ifdef HAS_DOT
EXPORT int has_products() { return 1; }

// x [rows, inputs], bfloat16, times a packed weight, plus a bias where there is one, into bf16 or float rows. With `bytes`
// [rows, inputs] and `scales` [rows] as room, the product is one of 8 bits.
template <typename Store>
static void product_of(const void *x, int rows, int inputs, const void *weight, int outputs, const void *bias, void *bytes,
                       void *scales, int threads, const Store &put) {
#pragma omp parallel num_threads(threads)
    {
        Operand operand = {x, nullptr};
        if (bytes) {
            quantize((const bf16 *)x, rows, inputs, (uint8_t *)bytes, (float *)scales);
            operand = {bytes, (float *)scales};
        }
        product(operand, rows, inputs, *(const Weight *)weight, outputs, [&](int row, int column, vec sums) {
            if (bias) sums += load((const bf16 *)bias + column);
            put(int64_t(row) * outputs + column, sums);
        });
    }
}

EXPORT void product_to_bf16(const void *x, int rows, int inputs, const void *weight, int outputs, const void *bias,
                            void *bytes, void *scales, void *out, int threads) {
    product_of(x, rows, inputs, weight, outputs, bias, bytes, scales, threads,
               [&](int64_t at, vec sums) { store_rounded((bf16 *)out + at, sums); });
}

EXPORT void product_to_f32(const void *x, int rows, int inputs, const void *weight, int outputs, const void *bias,
                           void *bytes, void *scales, void *out, int threads) {
    product_of(x, rows, inputs, weight, outputs, bias, bytes, scales, threads,
               [&](int64_t at, vec sums) { store((float *)out + at, sums); });
}

EXPORT void stack_bf16(const void *model, const void *step, int threads) {
    all_layers(*(const Model *)model, *(const Step *)step, threads);
}
#else
EXPORT int has_products() { return 0; }
#endif
