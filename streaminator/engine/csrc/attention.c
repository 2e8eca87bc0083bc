// SPDX-License-Identifier: Apache-2.0
//
// Rotation and attention over the blocks of the KV cache, on a CPU. Compiled by `compile_kernels.py`
// for one type of weights and one head dim: -DBF16=0|1 -DHEAD_DIM=... -DBLOCK=16.
//
// Exactness: a row is computed by the same instructions in the same order whatever else is in the
// batch. By vectors, rows are padded to whole tiles; a row's keys are read in the order of their blocks, and
// keys it may not see add exact zeros.
//
// Where there is a tile unit it does the multiplying (`attention_tiles.c`).
//
// Speed: few rows share a key, so that it is read as fast as the memory is, or waited for. While a task
// reads its keys, its values are fetched; while it reads these, the keys of the next one.

#include "attention.h"

#define TILE 4        // rows that share what is loaded of keys and values, without the tile unit
#define TASK_ROWS 32  // rows of one KV head that a thread takes at a time
#ifdef __AVX512F__
#define SLICE 4  // vectors of a value that are summed up in registers
#else
#define SLICE 2
#endif
#define PART_SIZE (LANES * PAIR * (int)sizeof(scalar))
#define PER_LINE (PART_SIZE < LINE ? LINE / PART_SIZE : 1)  // of these vectors in a cache line

// Rows `row` to `row + num` of a sequence's KV head; a KV head has the rows of all its queries, and
// in each of these of all heads that share it.
typedef struct {
    int64_t sequence, kv_head, row, num;
} Task;

static int64_t rows_of(const Lines *lines, const Shape *shape, int64_t sequence) {
    return lines->counts[sequence] * (shape->num_heads / shape->num_kv_heads);
}

static int64_t parts_of(const Lines *lines, const Shape *shape, int64_t sequence) {
    return (rows_of(lines, shape, sequence) + TASK_ROWS - 1) / TASK_ROWS;
}

// `until` [num_sequences]: the sequences' tasks, one after another.
static Task task_of(const Lines *lines, const int64_t *until, const Shape *shape, int64_t index) {
    int64_t sequence = 0, last = lines->num_sequences - 1;
    while (sequence < last) {
        int64_t middle = (sequence + last) / 2;
        if (until[middle] > index)
            last = middle;
        else
            sequence = middle + 1;
    }
    int64_t rows = rows_of(lines, shape, sequence), parts = parts_of(lines, shape, sequence);
    index -= until[sequence] - shape->num_kv_heads * parts;
    int64_t row = index % parts * TASK_ROWS;
    return (Task){sequence, index / parts, row, rows - row < TASK_ROWS ? rows - row : TASK_ROWS};
}

// Rotate a head (Su et al. 2021), after its norm if there is one.
static void rotate(const scalar *x, const scalar *norm, float eps, const scalar *cosine,
                   const scalar *sine, float *out) {
    scalar normed[HEAD_DIM];
    if (norm) {
        norm_row(x, norm, normed, HEAD_DIM, eps);
        x = normed;
    }
    for (int at = 0; at < HEAD_DIM / 2; at++) {
        int other = at + HEAD_DIM / 2;
        float a = get(x[at]), b = get(x[other]);
        out[at] = a * get(cosine[at]) - b * get(sine[at]);
        out[other] = b * get(cosine[other]) + a * get(sine[other]);
    }
}

static void rotated(const scalar *x, const scalar *norm, float eps, const scalar *cosine,
                    const scalar *sine, scalar *out) {
    float turned[HEAD_DIM];
    rotate(x, norm, eps, cosine, sine, turned);
    for (int at = 0; at < HEAD_DIM; at += LANES) store(out + at, loadf(turned + at));
}

// Put a token's key and value into the block of its KV head.
static void put(const scalar *key, const scalar *value, scalar *keys, scalar *values, int64_t at) {
    for (int dim = 0; dim < HEAD_DIM; dim += PAIR)
        memcpy(keys + dim * BLOCK + at * PAIR, key + dim, PAIR * sizeof *key);
    scalar *to = values + at / PAIR * PAIR * HEAD_DIM + at % PAIR;
    for (int dim = 0; dim < HEAD_DIM; dim++) to[dim * PAIR] = value[dim];
}

// Zero the values behind a block's token `at`: what the block's last owner left may be NaN, which a
// weight of 0 does not undo. (Scores of keys not to be seen are replaced, not weighted.)
static void clear_behind(scalar *values, int64_t at) {
    scalar *rest = values + (at / PAIR + 1) * PAIR * HEAD_DIM;
    if (at % PAIR < PAIR - 1)
        for (int dim = 0; dim < HEAD_DIM; dim++) rest[(dim - HEAD_DIM) * PAIR + PAIR - 1] = 0;
    memset(rest, 0, (size_t)(values + BLOCK * HEAD_DIM - rest) * sizeof *rest);
}

// At most TILE rows of one KV head.
static void attend_tile(const Tile *tile, Room *room) {
    const int num = tile->num;
    const float scale = tile->scale;
    const int64_t window = tile->window, stride = room->stride;
    float *scores = room->scores;
    // A tile that is not full computes its last row several times.
    factor query[HEAD_DIM * TILE];  // [HEAD_DIM / PAIR, TILE, PAIR]
    int64_t positions[TILE], begin, end;
    for (int row = 0; row < TILE; row++) {
        int here = row < num ? row : num - 1;
        positions[row] = tile->positions[here];
        for (int dim = 0; dim < HEAD_DIM; dim++)
            query[(dim / PAIR * TILE + row) * PAIR + dim % PAIR] =
                factor_of(tile->queries[here * HEAD_DIM + dim]);
    }
    span_seen(tile, &begin, &end);
    vec most[TILE];
    for (int row = 0; row < TILE; row++) most[row] = spread(-INFINITY);
    for (int64_t block = begin; block < end; block++) {
        const scalar *key = keys_of(tile, block), *value = values_of(tile, block);
        for (int from = 0; from < BLOCK; from += LANES) {
            vec even[TILE], odd[TILE];
#pragma GCC unroll 4
            for (int row = 0; row < TILE; row++) even[row] = odd[row] = (vec){0};
            for (int at = 0; at < HEAD_DIM / PAIR; at += 2) {
                const scalar *part = key + (at * BLOCK + from) * PAIR;
                pairs here = pairs_at(part), after = pairs_at(part + BLOCK * PAIR);
                if (from == 0) {
                    __builtin_prefetch(value + at * BLOCK * PAIR, 0, 2);
                    __builtin_prefetch(value + (at + 1) * BLOCK * PAIR, 0, 2);
                }
#pragma GCC unroll 4
                for (int row = 0; row < TILE; row++) {
                    const factor *x = query + (at * TILE + row) * PAIR;
                    even[row] = add_products(even[row], here, x);
                    odd[row] = add_products(odd[row], after, x + TILE * PAIR);
                }
            }
#pragma GCC unroll 4
            for (int row = 0; row < TILE; row++) {
                int64_t first = block * BLOCK + from;
                vec sum = masked((even[row] + odd[row]) * scale, positions[row], window, first);
                most[row] = larger(sum, most[row]);
                storef(scores + row * stride + first - begin * BLOCK, sum);
            }
        }
    }
    // A row's weights take the place of its scores, as factors.
    float scales[TILE];
    for (int row = 0; row < TILE; row++)
        scales[row] = weigh(scores + row * stride, (end - begin) * BLOCK, largest_of(most[row]));
    for (int from = 0; from < HEAD_DIM; from += SLICE * LANES) {
        const int num_parts = (HEAD_DIM - from) / LANES < SLICE ? (HEAD_DIM - from) / LANES : SLICE;
        vec sums[TILE][SLICE];
#pragma GCC unroll 4
        for (int row = 0; row < TILE; row++)
#pragma GCC unroll 4
            for (int part = 0; part < SLICE; part++) sums[row][part] = (vec){0};
        for (int64_t block = begin; block < end; block++) {
            const scalar *value = values_of(tile, block), *next = next_of(tile, block - begin, value);
            const factor *weights = (const factor *)scores + (block - begin) * BLOCK;
            const int64_t weight_stride = stride * (int64_t)(sizeof *scores / sizeof *weights);
            for (int at = 0; at < BLOCK; at += PAIR) {
#pragma GCC unroll 4
                for (int part = 0; part < num_parts; part += PER_LINE)
                    __builtin_prefetch(next + at * HEAD_DIM + (from + part * LANES) * PAIR, 0, 2);
#pragma GCC unroll 4
                for (int part = 0; part < SLICE; part++) {
                    if (part >= num_parts) break;
                    pairs here = pairs_at(value + at * HEAD_DIM + (from + part * LANES) * PAIR);
#pragma GCC unroll 4
                    for (int row = 0; row < TILE; row++)
                        sums[row][part] =
                            add_products(sums[row][part], here, weights + row * weight_stride + at);
                }
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < TILE; row++)
#pragma GCC unroll 4
            for (int part = 0; part < SLICE; part++)
                if (part < num_parts && row < num)
                    store(tile->out[row] + from + part * LANES, sums[row][part] * scales[row]);
    }
}

static void attend_rows(const scalar *qkv, const scalar *cosine, const scalar *sine,
                        const scalar *keys, const scalar *values, scalar *out, const Shape *shape,
                        const Lines *lines, const Task *task, const Ahead *ahead, Room *room) {
    int64_t sequence = task->sequence, kv_head = task->kv_head;
    int64_t group = shape->num_heads / shape->num_kv_heads;
    int64_t width = (shape->num_heads + 2 * shape->num_kv_heads) * HEAD_DIM;
    int64_t head_size = BLOCK * HEAD_DIM, block_stride = shape->num_kv_heads * head_size;
    int64_t start = lines->starts[sequence], first = lines->firsts[sequence];
    Tile tile;
    tile.scale = shape->scale;
    tile.window = shape->window;
    tile.keys = keys + kv_head * head_size;
    tile.values = values + kv_head * head_size;
    tile.block_stride = block_stride;
    tile.table = lines->tables + sequence * lines->table_width;
    tile.own_block = -1;
    tile.ahead = ahead;
    if (sequence >= lines->num_sequences - lines->num_own) {
        scalar turned[HEAD_DIM];
        const scalar *key = qkv + start * width + (shape->num_heads + kv_head) * HEAD_DIM;
        int64_t block = first / BLOCK;
        memcpy(tile.own_key, keys_of(&tile, block), sizeof tile.own_key);
        memcpy(tile.own_value, values_of(&tile, block), sizeof tile.own_value);
        tile.own_block = block;
        rotated(key, shape->k_norm, shape->eps, cosine + start * HEAD_DIM, sine + start * HEAD_DIM,
                turned);
        put(turned, key + shape->num_kv_heads * HEAD_DIM, tile.own_key, tile.own_value,
            first % BLOCK);
    }
    const int by_unit = attends_by_unit(), most = by_unit ? TILE_ROWS : TILE;
    for (int64_t done = 0; done < task->num; done += most) {
        tile.num = (int)(task->num - done < most ? task->num - done : most);
        for (int index = 0; index < tile.num; index++) {
            int64_t here = task->row + done + index;
            int64_t at = start + here / group, head = kv_head * group + here % group;
            rotated(qkv + at * width + head * HEAD_DIM, shape->q_norm, shape->eps,
                    cosine + at * HEAD_DIM, sine + at * HEAD_DIM, tile.queries + index * HEAD_DIM);
            tile.positions[index] = first + here / group;
            tile.out[index] = out + (at * shape->num_heads + head) * HEAD_DIM;
        }
        if (by_unit)
            attend_by_unit(&tile, room);
        else
            attend_tile(&tile, room);
    }
}

// Causal attention of packed rows over each sequence's blocks, after their keys and values have
// been written there.
//
// qkv [num_rows, (N + 2 K) * HEAD_DIM]; cosine, sine [num_rows, HEAD_DIM]; out [num_rows, N *
// HEAD_DIM]. Returns 0, or 1 when there is no memory.
int attend(const scalar *qkv, const scalar *cosine, const scalar *sine, scalar *keys,
           scalar *values, scalar *out, const Shape *shape, const Lines *lines, int num_threads) {
    int64_t kv_heads = shape->num_kv_heads;
    int64_t width = (shape->num_heads + 2 * kv_heads) * HEAD_DIM, head_size = BLOCK * HEAD_DIM;
    int64_t num_tasks = 0;
    // An odd number of lines: else rows may lie in the same places of a cache.
    int64_t score_stride = (lines->table_width | 1) * BLOCK;
    int failed = 0;
    int64_t *until = malloc((size_t)lines->num_sequences * sizeof *until);
    if (!until) return 1;
    for (int64_t index = 0; index < lines->num_sequences; index++) {
        num_tasks += kv_heads * parts_of(lines, shape, index);
        until[index] = num_tasks;
    }
#pragma omp parallel num_threads(num_threads) reduction(| : failed)
    {
        int num_rows = attends_by_unit() ? TILE_ROWS : TILE;
        size_t num_bytes = (size_t)(num_rows * score_stride) * sizeof(float);
        Room room = {aligned_alloc(LINE, num_bytes), score_stride, 0};
        failed = !room.scores;
#pragma omp for
        for (int64_t row = 0; row < lines->num_written; row++) {
            int64_t slot = lines->slots[row], block = slot / BLOCK, offset = slot % BLOCK;
            // A block's first token is written where its new owner begins it.
            int is_new = row >= offset && lines->slots[row - offset] == slot - offset;
            int is_last = row + 1 == lines->num_written || lines->slots[row + 1] / BLOCK != block;
            for (int64_t head = 0; head < kv_heads; head++) {
                scalar turned[HEAD_DIM];
                const scalar *key = qkv + row * width + (shape->num_heads + head) * HEAD_DIM;
                int64_t to = (block * kv_heads + head) * head_size;
                rotated(key, shape->k_norm, shape->eps, cosine + row * HEAD_DIM,
                        sine + row * HEAD_DIM, turned);
                put(turned, key + kv_heads * HEAD_DIM, keys + to, values + to, offset);
                if (is_new && is_last) clear_behind(values + to, offset);
            }
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t index = 0; index < num_tasks; index++) {
            Task task = task_of(lines, until, shape, index);
            Ahead ahead = {0};
            // Most likely the next one of this thread.
            if (index + num_threads < num_tasks) {
                Task next = task_of(lines, until, shape, index + num_threads);
                Span span = span_of(lines, shape, next.sequence);
                ahead = (Ahead){keys + next.kv_head * head_size, span.table, span.num};
            }
            if (room.scores)
                attend_rows(qkv, cosine, sine, keys, values, out, shape, lines, &task, &ahead, &room);
        }
        leave_unit(&room);
        free(room.scores);
    }
    free(until);
    return failed;
}
