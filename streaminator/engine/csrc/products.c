// SPDX-License-Identifier: Apache-2.0
//
// Matrix products of few rows with weights that are packed for them, on a CPU with AVX-512; `tiles.c` has
// those of a CPU with AMX. Compiled by `compile_kernels.py` for one type of weights: -DBF16=0|1.
//
// Exactness: a row's sums are built up input by input, by the same instructions in any batch; the
// last tile, of ROWS or half as many, is filled with rows that are not stored.

#include "products.h"

// The products of `rows` rows, a constant, with a panel of weights, while lines are fetched, PIECE of them
// at each of `places`.
static inline __attribute__((always_inline)) void product_tile(const int rows, const scalar *x,
                                                               int64_t num_inputs,
                                                               const scalar *panel,
                                                               const char *const *places,
                                                               vec out[ROWS][2]) {
    vec sums[ROWS][2];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = (vec){0};
    for (int64_t begin = 0; begin < num_inputs; begin += PIECE * PAIR, places++) {
        int64_t end = begin + PIECE * PAIR < num_inputs ? begin + PIECE * PAIR : num_inputs;
        const char *line = *places;
        for (int64_t at = begin; at < end; at += PAIR, panel += PANEL * PAIR, line += LINE) {
            __builtin_prefetch(line, 0, 2);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                pair factor = pair_at(x + row * num_inputs + at);
                sums[row][0] = add_products(sums[row][0], panel, factor);
                sums[row][1] = add_products(sums[row][1], panel + LANES * PAIR, factor);
            }
        }
    }
    memcpy(out, sums, (size_t)rows * sizeof *sums);
}

// [num_outputs, num_inputs] -> [num_outputs / PANEL, num_inputs / PAIR, PANEL, PAIR].
void pack_weight(const scalar *weight, scalar *packed, int64_t num_outputs, int64_t num_inputs) {
    for (int64_t out = 0; out < num_outputs; out++)
        for (int64_t in = 0; in < num_inputs; in++)
            packed[(out / PANEL * num_inputs + in / PAIR * PAIR) * PANEL + out % PANEL * PAIR +
                   in % PAIR] = weight[out * num_inputs + in];
}

// Whether it is worth it on this processor.
int are_products_fast(void) {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}

// x [num_rows, num_inputs] -> [num_rows, num_outputs], plus bias [num_outputs] and residual
// [num_rows, num_outputs], which may be `out`, where there are such. Returns 0, or 1 when there is no memory.
//
// Tiles behind the second fetch what is `coming`, if that is given, and take it off.
int product(const scalar *x, const scalar *packed, const scalar *bias, const scalar *residual,
            scalar *out, int64_t num_rows, int64_t num_outputs, int64_t num_inputs, Coming *coming,
            int num_threads) {
    if (num_inputs % DEPTH == 0 && has_tiles())
        return tile_product(x, packed, bias, residual, out, num_rows, num_outputs, num_inputs,
                            num_threads);
    int64_t num_whole = num_rows / ROWS * ROWS, num_tiles = (num_rows + ROWS - 1) / ROWS;
    int64_t num_steps = num_inputs / PAIR, num_parts = (num_steps + PIECE - 1) / PIECE;
    int64_t num_whole_parts = num_steps / PIECE, num_idle = num_idle_tiles(num_rows);
    scalar *last = NULL;
    if (num_rows % (ROWS / 2) || num_rows - num_whole > ROWS / 2) {
        last = calloc((size_t)(ROWS * num_inputs), sizeof *last);
        if (!last) return 1;
        memcpy(last, x + num_whole * num_inputs,
               (size_t)((num_rows - num_whole) * num_inputs) * sizeof *last);
    }
#pragma omp parallel for num_threads(num_threads)
    for (int64_t panel = 0; panel < num_outputs / PANEL; panel++)
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            vec sums[ROWS][2];
            const scalar *weights = packed + panel * PANEL * num_inputs;
            const char *places[num_parts];
            // All tiles but the first find the panel in the cache, so that the memory would be idle:
            // the first two fetch the next panel. With one tile it never is.
            int64_t ahead = num_tiles > 1 && tile < 2 ? (2 + tile) * LINE * num_steps : 0;
            for (int64_t part = 0; part < num_parts; part++)
                places[part] = (const char *)weights + ahead + part * PIECE * LINE;
            if (coming && tile >= 2) {
                int64_t first = (panel * num_idle + tile - 2) * num_whole_parts;
                for (int64_t part = 0; part < num_whole_parts && first + part < coming->num; part++)
                    places[part] = coming->pieces[first + part];
            }
            int64_t row = tile * ROWS;
            const scalar *rows = row < num_whole || !last ? x + row * num_inputs : last;
            if (num_rows - row <= ROWS / 2)
                product_tile(ROWS / 2, rows, num_inputs, weights, places, sums);
            else
                product_tile(ROWS, rows, num_inputs, weights, places, sums);
            for (int index = 0; index < ROWS && row + index < num_rows; index++)
                for (int half = 0; half < 2; half++) {
                    int64_t column = panel * PANEL + half * LANES;
                    finish(sums[index][half], bias, residual, out, column,
                           (row + index) * num_outputs + column);
                }
        }
    if (coming) {
        int64_t fetched = num_outputs / PANEL * num_idle * num_whole_parts;
        if (fetched > coming->num) fetched = coming->num;
        coming->pieces += fetched;
        coming->num -= fetched;
    }
    free(last);
    return 0;
}
