// SPDX-License-Identifier: Apache-2.0
//
// Matrix products of few rows with weights that are packed for them, on a CPU with AVX2 or AVX-512;
// `product_tiles.c` has those of a CPU with AMX. Compiled by `compile_kernels.py` for one type of weights: -DBF16=0|1.
//
// Exactness: a row's sums are built up input by input, by the same instructions in any batch; the
// last tile, of ROWS or half as many, is filled with rows that are not stored.

#include "products.h"

// Rows whose sums with two vectors of outputs fill the processor's registers, and pieces that one tile alone
// fetches: where two vectors are a whole panel, the processor does so itself.
#ifdef __AVX512F__
#define SUM_ROWS ROWS
#define ALONE 0
#else
#define SUM_ROWS (ROWS / 2)
#define ALONE 2
#endif
#define IS_CONVERTED (sizeof(factor) != sizeof(scalar))

// Add the products of `rows` rows with two vectors of `num` inputs of a panel of weights, while lines from
// `line` on are fetched, if it is given: one at `every` so many inputs. `rows` and `every` are constants.
static inline __attribute__((always_inline)) void add_up(const int rows, const factor *x,
                                                         int64_t num_inputs, const scalar *panel,
                                                         int64_t num, const char *line, const int every,
                                                         vec out[ROWS][PANEL / LANES]) {
    vec sums[SUM_ROWS][2];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) memcpy(sums[row], out[row], sizeof sums[row]);
#pragma GCC unroll 2
    for (int64_t at = 0; at < num; at += PAIR, panel += PANEL * PAIR) {
        if (line && at / PAIR % every == 0)
            __builtin_prefetch(line + at / PAIR / every * LINE, 0, 2);
        pairs left = pairs_at(panel), right = pairs_at(panel + LANES * PAIR);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            const factor *one = x + row * num_inputs + at;
            sums[row][0] = add_products(sums[row][0], left, one);
            sums[row][1] = add_products(sums[row][1], right, one);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) memcpy(out[row], sums[row], sizeof sums[row]);
}

// The products of `rows` rows with a panel of weights, while lines are fetched: at each of `places`
// `pieces` times PIECE; `rows` and `pieces` are constants. What is read of the panel meanwhile stays in the
// nearest cache.
static inline __attribute__((always_inline)) void product_tile(const int rows, const factor *x,
                                                               int64_t num_inputs,
                                                               const scalar *panel,
                                                               const char *const *places,
                                                               const int pieces,
                                                               vec out[ROWS][PANEL / LANES]) {
    const int step = rows < SUM_ROWS ? rows : SUM_ROWS;
    // In all passes alike, since the memory takes its time.
    const int every = pieces == ALONE ? rows / step : 1;
    memset(out, 0, (size_t)rows * sizeof *out);
    for (int64_t begin = 0; begin < num_inputs; begin += PIECE * PAIR, places++) {
        int64_t left = num_inputs - begin, num = left < PIECE * PAIR ? left : PIECE * PAIR;
#pragma GCC unroll 4
        for (int part = 0; part < PANEL / LANES; part += 2)
#pragma GCC unroll 2
            for (int row = 0; row < rows; row += step) {
                int pass = (part / 2 * rows + row) / step;
                add_up(step, x + row * num_inputs + begin, num_inputs,
                       panel + begin * PANEL + part * LANES * PAIR, num,
                       pass < pieces * every ? *places + pass * (num / PAIR / every) * LINE : NULL,
                       every, (vec(*)[PANEL / LANES])(out[row] + part));
            }
    }
}

// The same for tiles that fetch for themselves, for others, or not.
static inline __attribute__((always_inline)) void product_tile_of(
    const int rows, const factor *x, int64_t num_inputs, const scalar *panel,
    const char *const *places, int is_alone, int fetches, vec out[ROWS][PANEL / LANES]) {
    if (is_alone)
        product_tile(rows, x, num_inputs, panel, places, ALONE, out);
    else if (fetches)
        product_tile(rows, x, num_inputs, panel, places, 1, out);
    else
        product_tile(rows, x, num_inputs, panel, places, 0, out);
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
#if defined __AVX512F__ || defined __AVX2__ && defined __FMA__
    return 1;
#else
    return 0;
#endif
}

static int is_by_tiles(int64_t num_inputs) { return num_inputs % DEPTH == 0 && has_tiles(); }

// Rows for which a product takes about as long as for fewer of them.
int rows_at_once(int64_t num_inputs) { return is_by_tiles(num_inputs) ? TILE_ROWS : ROWS / 2; }

// x [num_rows, num_inputs] -> [num_rows, num_outputs], plus bias [num_outputs] and residual
// [num_rows, num_outputs], which may be `out`, where there are such. Returns 0, or 1 when there is no memory.
//
// Tiles behind the second fetch what is `coming`, if that is given, and take it off.
int product(const scalar *x, const scalar *packed, const scalar *bias, const scalar *residual,
            scalar *out, int64_t num_rows, int64_t num_outputs, int64_t num_inputs, Coming *coming,
            int num_threads) {
    if (is_by_tiles(num_inputs))
        return tile_product(x, packed, bias, residual, out, num_rows, num_outputs, num_inputs,
                            num_threads);
    int64_t num_whole = num_rows / ROWS * ROWS, num_tiles = (num_rows + ROWS - 1) / ROWS;
    int64_t num_steps = num_inputs / PAIR, num_parts = (num_steps + PIECE - 1) / PIECE;
    int64_t num_whole_parts = num_steps / PIECE, num_idle = num_idle_tiles(num_rows);
    int is_whole = num_rows % (ROWS / 2) == 0 && num_rows - num_whole <= ROWS / 2;
    // Rows from here on are copied, and filled up to whole tiles.
    int64_t first = IS_CONVERTED ? 0 : is_whole ? num_rows : num_whole;
    int64_t num_kept = first < num_rows ? num_tiles * ROWS - first : 0;
    factor *kept = NULL;
    if (num_kept && !(kept = malloc((size_t)(num_kept * num_inputs) * sizeof *kept))) return 1;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for nowait
        for (int64_t row = 0; row < num_kept; row++)
            for (int64_t at = 0; at < num_inputs; at++)
                kept[row * num_inputs + at] =
                    first + row < num_rows ? factor_of(x[(first + row) * num_inputs + at]) : 0;
        if (num_kept) {
#pragma omp barrier
        }
#pragma omp for
        for (int64_t panel = 0; panel < num_outputs / PANEL; panel++)
            for (int64_t tile = 0; tile < num_tiles; tile++) {
                vec sums[ROWS][PANEL / LANES];
                const scalar *weights = packed + panel * PANEL * num_inputs;
                const char *places[num_parts];
                // All tiles but the first find the panel in the cache, so that the memory would be idle:
                // the first two fetch the next panel. One alone fetches what it needs next itself.
                int is_alone = num_tiles == 1, fetches = !is_alone && tile < 2;
                int64_t stride = (is_alone ? ALONE : 1) * PIECE * LINE, ahead = 0;
                if (is_alone) ahead = stride;
                if (fetches) ahead = (2 + tile) * LINE * num_steps;
                for (int64_t part = 0; part < num_parts; part++)
                    places[part] = (const char *)weights + ahead + part * stride;
                if (coming && tile >= 2) {
                    int64_t next = (panel * num_idle + tile - 2) * num_whole_parts;
                    fetches = next < coming->num;
                    for (int64_t part = 0; part < num_whole_parts && next + part < coming->num; part++)
                        places[part] = coming->pieces[next + part];
                }
                int64_t row = tile * ROWS;
                const factor *rows = row < first ? (const factor *)x + row * num_inputs
                                                 : kept + (row - first) * num_inputs;
                if (num_rows - row <= ROWS / 2)
                    product_tile_of(ROWS / 2, rows, num_inputs, weights, places, is_alone, fetches, sums);
                else
                    product_tile_of(ROWS, rows, num_inputs, weights, places, is_alone, fetches, sums);
                for (int index = 0; index < ROWS && row + index < num_rows; index++)
                    for (int part = 0; part < PANEL / LANES; part++) {
                        int64_t column = panel * PANEL + part * LANES;
                        finish(sums[index][part], bias, residual, out, column,
                               (row + index) * num_outputs + column);
                    }
            }
    }
    if (coming) {
        int64_t fetched = num_outputs / PANEL * num_idle * num_whole_parts;
        if (fetched > coming->num) fetched = coming->num;
        coming->pieces += fetched;
        coming->num -= fetched;
    }
    free(kept);
    return 0;
}
