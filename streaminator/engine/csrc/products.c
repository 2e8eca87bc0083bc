// SPDX-License-Identifier: Apache-2.0
//
// Matrix products of few rows with weights that are packed for them, on a CPU with AVX-512.
// Compiled by `kernels.py` for one type of weights: -DBF16=0|1.
//
// Exactness: a row's sums are built up input by input, by the same instructions in any batch; the
// last tile is filled with rows that are not stored.

#include "vectors.h"

#define PANEL 32  // outputs that a tile of a product has
#define ROWS 8    // rows that it has
#define LINE 64   // bytes of a cache line: of its weights, a tile reads two at a time

// The products of ROWS rows with a panel of weights, while half as many bytes of `coming` are
// fetched.
static inline void product_tile(const scalar *x, int64_t num_inputs, const scalar *panel,
                                const char *coming, vec out[ROWS][2]) {
    vec sums[ROWS][2];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = (vec){0};
    for (int64_t at = 0; at < num_inputs; at += PAIR, panel += PANEL * PAIR, coming += LINE) {
        __builtin_prefetch(coming, 0, 2);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            pair factor = pair_at(x + row * num_inputs + at);
            sums[row][0] = add_products(sums[row][0], panel, factor);
            sums[row][1] = add_products(sums[row][1], panel + LANES * PAIR, factor);
        }
    }
    memcpy(out, sums, sizeof sums);
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
int product(const scalar *x, const scalar *packed, const scalar *bias, const scalar *residual,
            scalar *out, int64_t num_rows, int64_t num_outputs, int64_t num_inputs,
            int num_threads) {
    int64_t num_whole = num_rows / ROWS * ROWS;
    scalar *last = NULL;
    if (num_whole < num_rows) {
        last = calloc((size_t)(ROWS * num_inputs), sizeof *last);
        if (!last) return 1;
        memcpy(last, x + num_whole * num_inputs,
               (size_t)((num_rows - num_whole) * num_inputs) * sizeof *last);
    }
#pragma omp parallel for num_threads(num_threads)
    for (int64_t panel = 0; panel < num_outputs / PANEL; panel++)
        for (int64_t row = 0; row < num_rows; row += ROWS) {
            vec sums[ROWS][2];
            // All tiles but the first find the panel in the cache, so that the memory would be idle:
            // the first two fetch the next panel. With one tile it never is.
            const scalar *weights = packed + panel * PANEL * num_inputs;
            const char *coming = (const char *)weights;
            if (num_rows > ROWS && row <= ROWS)
                coming += (2 + row / ROWS) * LINE * (num_inputs / PAIR);
            product_tile(row < num_whole ? x + row * num_inputs : last, num_inputs, weights, coming,
                         sums);
            for (int index = 0; index < ROWS && row + index < num_rows; index++)
                for (int half = 0; half < 2; half++) {
                    int64_t column = panel * PANEL + half * LANES;
                    int64_t at = (row + index) * num_outputs + column;
                    vec sum = sums[index][half];
                    if (bias) sum += load(bias + column);
                    if (residual) sum += load(residual + at);
                    store(out + at, sum);
                }
        }
    free(last);
    return 0;
}
