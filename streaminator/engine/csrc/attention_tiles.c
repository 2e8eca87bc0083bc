// SPDX-License-Identifier: Apache-2.0
//
// Attention by the tile unit of a CPU that has AMX, in bfloat16: a block of keys, and one of values, is
// multiplied with all rows of a tile in the time that vectors take for one or two.
//
// Exactness: a row's scores are built up 32 dims at a time, its values block after block, by the same
// instructions whatever other rows are in its tile; keys it may not see have weights of 0.

#include "attention.h"

#if ATTENDS_BY_TILES

#define DIMS 32  // that are multiplied at a time: a row of a tile
#define REST (HEAD_DIM % DIMS)
#define PARTS 4  // vectors of values that are summed up at a time
#define KEY_BYTES (TILE_BYTES / 2)

// Tiles 0 to 3: sums; 4: queries, 5: keys; 6: the rest of the queries, or weights; 7: the rest of the
// keys, or values.
static void enter_unit(Room *room, int num) {
    if (room->tile_rows == num) return;
    TileShapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shapes.bytes[tile] = TILE_BYTES, shapes.rows[tile] = num;
    shapes.rows[5] = TILE_ROWS;
    shapes.bytes[6] = KEY_BYTES;
    shapes.rows[7] = BLOCK / PAIR;
    WRITTEN;
    _tile_loadconfig(&shapes);
    room->tile_rows = num;
}

void leave_unit(Room *room) {
    if (room->tile_rows) _tile_release();
    room->tile_rows = 0;
}

static void score(const Tile *tile, int64_t begin, int64_t end, Room *room) {
    const int64_t row_bytes = HEAD_DIM * sizeof(scalar), stride = room->stride * sizeof(float);
    float *scores = room->scores;
    for (int64_t block = begin; block < end; block++, scores += BLOCK) {
        const scalar *key = keys_of(tile, block), *value = values_of(tile, block);
        _tile_zero(0);
        for (int dim = 0; dim + DIMS <= HEAD_DIM; dim += DIMS) {
            _tile_loadd(4, tile->queries + dim, row_bytes);
            _tile_loadd(5, key + dim * BLOCK, TILE_BYTES);
            _tile_dpbf16ps(0, 4, 5);
            fetch(value + dim * BLOCK, TILE_ROWS, TILE_BYTES);
        }
        if (REST) {
            _tile_loadd(6, tile->queries + HEAD_DIM - REST, row_bytes);
            _tile_loadd(7, key + (HEAD_DIM - REST) * BLOCK, TILE_BYTES);
            _tile_dpbf16ps(0, 6, 7);
            fetch(value + (HEAD_DIM - REST) * BLOCK, BLOCK / PAIR, TILE_BYTES);
        }
        _tile_stored(0, scores, stride);
    }
}

// Adds the products of weights and a part of a block's values to one of the tiles of sums.
#define ADD_VALUES(part)                                                        \
    if (part < num) {                                                           \
        _tile_loadd(7, value + part * LANES * PAIR, value_bytes);               \
        _tile_dpbf16ps(part, 6, 7);                                             \
        fetch(next + part * LANES * PAIR, BLOCK / PAIR, value_bytes);           \
    }

// The sums of `num` vectors of values from dim `from` on, and store them.
static inline __attribute__((always_inline)) void sum_values(const int num, const int from,
                                                             const Tile *tile, int64_t begin,
                                                             int64_t end, const Room *room,
                                                             const float *scales) {
    const scalar *weights = (const scalar *)room->scores;
    const int64_t stride = room->stride * sizeof(float);
    const int value_bytes = HEAD_DIM * PAIR * sizeof(scalar);
    float sums[PARTS][TILE_ROWS][LANES] __attribute__((aligned(LINE)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t block = begin; block < end; block++, weights += BLOCK) {
        const scalar *value = values_of(tile, block);
        const scalar *next = next_of(tile, block - begin, value) + from * PAIR;
        value += from * PAIR;
        _tile_loadd(6, weights, stride);
        ADD_VALUES(0)
        ADD_VALUES(1)
        ADD_VALUES(2)
        ADD_VALUES(3)
    }
    _tile_stored(0, sums[0], TILE_BYTES);
    _tile_stored(1, sums[1], TILE_BYTES);
    _tile_stored(2, sums[2], TILE_BYTES);
    _tile_stored(3, sums[3], TILE_BYTES);
    for (int row = 0; row < tile->num; row++)
#pragma GCC unroll 4
        for (int part = 0; part < num; part++)
            store(tile->out[row] + from + part * LANES, loadf(sums[part][row]) * scales[row]);
}

void attend_by_unit(const Tile *tile, Room *room) {
    int64_t begin, end;
    float scales[TILE_ROWS];
    enter_unit(room, tile->num);
    span_seen(tile, &begin, &end);
    score(tile, begin, end, room);
    for (int row = 0; row < tile->num; row++) {
        float *scores = room->scores + row * room->stride;
        vec most = spread(-INFINITY);
        for (int64_t key = begin * BLOCK; key < end * BLOCK; key += LANES) {
            float *here = scores + key - begin * BLOCK;
            vec sum = masked(loadf(here) * tile->scale, tile->positions[row], tile->window, key);
            most = larger(sum, most);
            storef(here, sum);
        }
        scales[row] = weigh(scores, (end - begin) * BLOCK, largest_of(most));
    }
    WRITTEN;
    int from = 0;
    for (; from + PARTS * LANES <= HEAD_DIM; from += PARTS * LANES)
        sum_values(PARTS, from, tile, begin, end, room, scales);
    if (from < HEAD_DIM) sum_values(HEAD_DIM / LANES % PARTS, from, tile, begin, end, room, scales);
}

#else

void attend_by_unit(const Tile *tile, Room *room) {}

void leave_unit(Room *room) {}

#endif
