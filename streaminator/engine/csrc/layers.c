// SPDX-License-Identifier: Apache-2.0
//
// Llama-like layers on a CPU: norm, activation, and what joins them to `products.c` and `attention.c`.
// Compiled by `compile_kernels.py` for one type of weights and one head dim.

#include "attention.h"
#include "products.h"

#define MOST_PIECES 1024  // 8 MiB of keys and values: what a shared cache keeps until they are read

// [num_rows, dim] -> [num_rows, dim].
void rms_norm(const scalar *x, const scalar *weight, scalar *out, int64_t num_rows, int64_t dim,
              float eps, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * dim > 1 << 15)
    for (int64_t row = 0; row < num_rows; row++)
        norm_row(x + row * dim, weight, out + row * dim, dim, eps);
}

// silu(gate) * up: [num_rows, 2 * dim] -> [num_rows, dim] (SwiGLU, Shazeer 2020).
void silu_mul(const scalar *both, scalar *out, int64_t num_rows, int64_t dim, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * dim > 1 << 14)
    for (int64_t row = 0; row < num_rows; row++) {
        const scalar *gate = both + row * 2 * dim, *up = gate + dim;
        for (int64_t at = 0; at < dim; at += LANES) {
            vec g = load(gate + at);
            store(out + row * dim + at, rounded(g / (exp_of(-g) + 1.0f)) * load(up + at));
        }
    }
}

typedef struct {
    const scalar *packed, *bias;  // of `products.c`; bias may be null
} Weight;

typedef struct {
    int64_t dim, inner;  // widths of a row and of the activation
    Shape shape;
    const scalar *first_norm, *second_norm;  // [dim]
    float first_eps, second_eps;
    Weight qkv, output, gate_up, down;
    scalar *keys, *values;
} Layer;

// Numbers of scratch that `run_layers` needs for a row.
int64_t room_of(const Layer *layer) {
    const Shape *shape = &layer->shape;
    return layer->dim + 2 * (shape->num_heads + shape->num_kv_heads) * HEAD_DIM + 3 * layer->inner;
}

// The sequences' blocks of a layer, in the order in which they are read, as far as they fit.
static int64_t blocks_of(const Layer *layer, const Lines *lines, const char *pieces[MOST_PIECES]) {
    int64_t size = BLOCK * HEAD_DIM * layer->shape.num_kv_heads * (int64_t)sizeof(scalar), num = 0;
    const char *sides[] = {(const char *)layer->keys, (const char *)layer->values};
    for (int64_t sequence = 0; sequence < lines->num_sequences - lines->num_own; sequence++) {
        Span span = span_of(lines, &layer->shape, sequence);
        for (int64_t index = 0; index < span.num; index++)
            for (int side = 0; side < 2; side++)
                for (int64_t at = 0; at + PIECE * LINE <= size; at += PIECE * LINE) {
                    if (num == MOST_PIECES) return num;
                    pieces[num++] = sides[side] + span.table[index] * size + at;
                }
    }
    return num;
}

// Whole layers, one after another, on x [num_rows, dim]. Returns 0, or 1 when there is no memory.
int run_layers(scalar *x, scalar *room, const scalar *cosine, const scalar *sine,
               const Layer *layers, int64_t num_layers, const Lines *lines, int64_t num_rows,
               int num_threads) {
    const char *pieces[MOST_PIECES];
    Coming coming = {pieces, 0};
    for (const Layer *layer = layers; layer < layers + num_layers; layer++) {
        const Shape *shape = &layer->shape;
        int64_t dim = layer->dim, inner = layer->inner, size = shape->num_heads * HEAD_DIM;
        int64_t width = size + 2 * shape->num_kv_heads * HEAD_DIM;
        scalar *normed = room, *qkv = normed + num_rows * dim, *attended = qkv + num_rows * width;
        scalar *both = attended + num_rows * size, *activated = both + num_rows * 2 * inner;
        int failed = 0;
        rms_norm(x, layer->first_norm, normed, num_rows, dim, layer->first_eps, num_threads);
        failed |= product(normed, layer->qkv.packed, layer->qkv.bias, NULL, qkv, num_rows, width,
                          dim, &coming, num_threads);
        memset(attended + lines->num_rows * size, 0,
               (size_t)((num_rows - lines->num_rows) * size) * sizeof *attended);
        failed |= attend(qkv, cosine, sine, layer->keys, layer->values, attended, shape, lines,
                         num_threads);
        // From here on, with many rows, the memory is idle: the next layer's keys are fetched.
        if (num_idle_tiles(num_rows)) {
            int is_last = layer + 1 == layers + num_layers;
            coming = (Coming){pieces, is_last ? 0 : blocks_of(layer + 1, lines, pieces)};
        }
        failed |= product(attended, layer->output.packed, layer->output.bias, x, x, num_rows, dim,
                          size, &coming, num_threads);
        rms_norm(x, layer->second_norm, normed, num_rows, dim, layer->second_eps, num_threads);
        failed |= product(normed, layer->gate_up.packed, layer->gate_up.bias, NULL, both, num_rows,
                          2 * inner, dim, &coming, num_threads);
        silu_mul(both, activated, num_rows, inner, num_threads);
        failed |= product(activated, layer->down.packed, layer->down.bias, x, x, num_rows, dim,
                          inner, &coming, num_threads);
        if (failed) return 1;
    }
    return 0;
}
