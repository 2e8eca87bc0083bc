// SPDX-License-Identifier: Apache-2.0
//
// What `layers.c` uses of `attention.c`.
//
// Layouts, for K KV heads: a block of keys [K, HEAD_DIM / PAIR, BLOCK, PAIR], of values [K, BLOCK /
// PAIR, HEAD_DIM, PAIR].

#include "vectors.h"

#if BLOCK % LANES || HEAD_DIM % LANES
#error "a block is whole vectors of keys, a head whole vectors"
#endif

typedef struct {
    int64_t num_heads, num_kv_heads;
    float scale, eps;
    int64_t window;  // keys that a query sees at most, itself included
    const scalar *q_norm, *k_norm;  // [HEAD_DIM] or null
} Shape;

typedef struct {
    int64_t num_rows;     // of queries
    int64_t num_written;  // the first rows, whose keys and values go to the cache
    int64_t num_sequences;
    int64_t num_own;  // the last sequences, of one row each, which see their own key and value
    int64_t table_width;
    const int64_t *slots;   // [num_written] block * BLOCK + offset
    const int64_t *starts;  // [num_sequences] first row
    const int64_t *counts;  // [num_sequences] rows
    const int64_t *firsts;  // [num_sequences] position of the first row
    const int64_t *tables;  // [num_sequences, table_width] blocks
} Lines;

// The blocks that a sequence's rows see.
typedef struct {
    const int64_t *table;
    int64_t num;
} Span;

static Span span_of(const Lines *lines, const Shape *shape, int64_t sequence) {
    int64_t first = lines->firsts[sequence], seen = first - shape->window + 1;
    int64_t begin = seen > 0 ? seen / BLOCK : 0;
    int64_t end = (first + lines->counts[sequence] - 1) / BLOCK + 1;
    return (Span){lines->tables + sequence * lines->table_width + begin, end - begin};
}

int attend(const scalar *qkv, const scalar *cosine, const scalar *sine, scalar *keys,
           scalar *values, scalar *out, const Shape *shape, const Lines *lines, int num_threads);

// x / rms(x) * weight of one row (Zhang and Sennrich 2019), rounded where transformers rounds.
static void norm_row(const scalar *x, const scalar *weight, scalar *out, int64_t dim, float eps) {
    vec squares = {0};
    for (int64_t at = 0; at < dim; at += LANES) {
        vec part = load(x + at);
        squares += part * part;
    }
    float factor = 1 / sqrtf(sum_of(squares) / dim + eps);
    for (int64_t at = 0; at < dim; at += LANES)
        store(out + at, load(weight + at) * rounded(load(x + at) * factor));
}
