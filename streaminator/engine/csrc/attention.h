// SPDX-License-Identifier: Apache-2.0
//
// What `layers.c` uses of `attention.c`, and this of `attention_tiles.c`.
//
// Layouts, for K KV heads: a block of keys [K, HEAD_DIM / PAIR, BLOCK, PAIR], of values [K, BLOCK /
// PAIR, HEAD_DIM, PAIR].

#include "tiles.h"

#if BLOCK != TILE_ROWS || HEAD_DIM % LANES
#error "a block is a tile of keys, a head whole vectors"
#endif

// Weights are multiplied as the vectors' kernels leave them: in bfloat16.
#if TILES && defined __AVX512BF16__
#define ATTENDS_BY_TILES 1
#else
#define ATTENDS_BY_TILES 0
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

// The first block that a query at a position sees.
static inline int64_t first_block(int64_t position, int64_t window) {
    int64_t first = position - window + 1;
    return first > 0 ? first / BLOCK : 0;
}

static Span span_of(const Lines *lines, const Shape *shape, int64_t sequence) {
    int64_t first = lines->firsts[sequence], begin = first_block(first, shape->window);
    int64_t end = (first + lines->counts[sequence] - 1) / BLOCK + 1;
    return (Span){lines->tables + sequence * lines->table_width + begin, end - begin};
}

// Keys that are read next: fetched while this task's values are read.
typedef struct {
    const scalar *keys;
    const int64_t *table;  // [num] blocks
    int64_t num;
} Ahead;

// Rows of one KV head that share what is loaded of keys and values, at most TILE_ROWS.
typedef struct {
    int num;
    int64_t positions[TILE_ROWS];
    scalar queries[TILE_ROWS * HEAD_DIM] __attribute__((aligned(LINE)));
    scalar *out[TILE_ROWS];
    float scale;
    int64_t window;
    const scalar *keys, *values;  // of the KV head in the first block
    int64_t block_stride;
    const int64_t *table;
    int64_t own_block;  // -1: none
    scalar own_key[BLOCK * HEAD_DIM], own_value[BLOCK * HEAD_DIM];
    const Ahead *ahead;
} Tile;

// What a thread works in.
typedef struct {
    float *scores;  // a row for each of a tile
    int64_t stride;
    int tile_rows;  // the tile unit is set to; 0: it is not
} Room;

static inline const scalar *keys_of(const Tile *tile, int64_t block) {
    return block == tile->own_block ? tile->own_key
                                    : tile->keys + tile->table[block] * tile->block_stride;
}

static inline const scalar *values_of(const Tile *tile, int64_t block) {
    return block == tile->own_block ? tile->own_value
                                    : tile->values + tile->table[block] * tile->block_stride;
}

// The blocks that a tile's rows see, whose positions rise; keys in them that a row may not see have no weight.
static inline void span_seen(const Tile *tile, int64_t *begin, int64_t *end) {
    *begin = first_block(tile->positions[0], tile->window);
    *end = tile->positions[tile->num - 1] / BLOCK + 1;
}

// What is fetched while a block of values is read: `index` counts from the first one.
static inline const scalar *next_of(const Tile *tile, int64_t index, const scalar *value) {
    const Ahead *ahead = tile->ahead;
    return index < ahead->num ? ahead->keys + ahead->table[index] * tile->block_stride : value;
}

// Scores of the keys from `first` on, -inf for those that a row at `position` may not see.
static inline vec masked(vec scores, int64_t position, int64_t window, int64_t first) {
    int64_t ahead = position - first, behind = ahead - window;
    if (ahead >= LANES - 1 && behind < 0) return scores;
    ints seen = numbered() <= (int32_t)(ahead < LANES ? ahead : LANES);
    seen &= numbered() > (int32_t)(behind < -1 ? -1 : behind > LANES ? LANES : behind);
    return choose(seen, scores, spread(-INFINITY));
}

// A row's weights, as factors, in the place of its `num` scores; returns what their sums are multiplied with.
static inline float weigh(float *scores, int64_t num, float most) {
    factor *weights = (factor *)scores;
    vec total = {0};
    for (int64_t at = 0; at < num; at += LANES) {
        vec weight = rounded(exp_of(loadf(scores + at) - most));
        total += weight;
        store_factors(weights + at, weight);
    }
    return 1 / sum_of(total);
}

// Attention of a tile's rows by the tile unit (`attention_tiles.c`); who has called it leaves the unit.
static inline int attends_by_unit(void) { return ATTENDS_BY_TILES && has_tiles(); }
void attend_by_unit(const Tile *tile, Room *room);
void leave_unit(Room *room);

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
