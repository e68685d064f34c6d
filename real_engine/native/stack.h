// All layers of a Llama-shaped decoder in bfloat16 (products in 8 bits where the weights are), by one team of threads: nothing is started or allocated between two
// operations, which for small batches costs as much as the operations.

#pragma once

#include "attention_dot.h"
#include "elementwise.h"

#ifdef HAS_DOT
namespace {

// What Python fills in (real_engine/native/stack.py); weights are packed as product.h says.
struct Layer {
    const bf16 *attention_norm, *mlp_norm, *qkv_bias;
    Weight qkv, output, gate_up, down;
    bf16 *keys, *values;  // this layer's cache
    int32_t window;
    float scale;
};

struct Model {
    const Layer *layers;
    const bf16 *cos, *sin;
    int32_t depth, hidden, heads, kv_heads, dim, inner, block_size;
    float eps;
};

struct Step {
    bf16 *x;  // [tokens, hidden]: embeddings before, the last layer's output after
    bf16 *normed, *qkv, *attended, *activated;  // room for [tokens, ...]
    uint8_t *bytes;                             // room for the rows of a product in 8 bits, where weights have 8
    float *scales;
    const int64_t *positions, *slots;
    const int32_t *starts, *lengths, *table;
    int64_t table_stride;
    int32_t tokens, sequences;
};

void all_layers(const Model &m, const Step &s, int threads) {
    const int wide = (m.heads + 2 * m.kv_heads) * m.dim, n = s.tokens;
    const std::vector<Task> todo = tasks(s.starts, s.sequences, m.kv_heads, threads);
    std::vector<int> taken(m.depth, 0);
    const auto add_to_x = [&](int row, int column, vec sums) {
        bf16 *x = s.x + int64_t(row) * m.hidden + column;
        store_rounded(x, load(x) + sums);
    };
    const auto operand = [&](const bf16 *rows, int width) -> Operand {
        if (!s.bytes) return {rows, nullptr};
        quantize(rows, n, width, s.bytes, s.scales);
        return {s.bytes, s.scales};
    };
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < m.depth; i++) {
        const Layer &layer = m.layers[i];
        const Paged<bf16> a = {s.qkv,    layer.keys, layer.values, s.attended, s.starts, s.lengths,    s.table, wide,
                               s.table_stride, m.heads, m.kv_heads, m.dim, m.block_size, layer.scale, layer.window};
        add_norm<bf16>(s.x, nullptr, layer.attention_norm, s.normed, n, m.hidden, m.eps);
        Operand x = operand(s.normed, m.hidden);
        product(x, n, m.hidden, layer.qkv, wide, [&](int row, int column, vec sums) {
            if (layer.qkv_bias) sums += load(layer.qkv_bias + column);
            store_rounded(s.qkv + int64_t(row) * wide + column, sums);
        });
        rotate_and_store<bf16>(s.qkv, n, m.heads, m.kv_heads, m.dim, m.cos, m.sin, s.positions, s.slots, layer.keys,
                               layer.values);
        attend_all(a, todo, taken[i]);
        x = operand(s.attended, m.heads * m.dim);
        product(x, n, m.heads * m.dim, layer.output, m.hidden, add_to_x);
        add_norm<bf16>(s.x, nullptr, layer.mlp_norm, s.normed, n, m.hidden, m.eps);
        x = operand(s.normed, m.hidden);
        gated_product(x, n, m.hidden, layer.gate_up, m.inner, s.activated);
        x = operand(s.activated, m.inner);
        product(x, n, m.inner, layer.down, m.hidden, add_to_x);
    }
}

}  // namespace
#endif
