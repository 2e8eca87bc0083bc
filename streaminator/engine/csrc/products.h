// SPDX-License-Identifier: Apache-2.0
//
// What `layers.c` uses of `products.c`.

#include "vectors.h"

#define LINE 64    // bytes of a cache line
#define PIECE 128  // lines that are fetched from one place
#define ROWS 8     // rows that a tile of a product has

// Places in memory that will be read soon, PIECE lines each, the first ones first.
typedef struct {
    const char **pieces;
    int64_t num;
} Coming;

// Tiles behind the second, which leave the memory idle.
static inline int64_t num_idle_tiles(int64_t num_rows) {
    int64_t num_tiles = (num_rows + ROWS - 1) / ROWS;
    return num_tiles > 2 ? num_tiles - 2 : 0;
}

int product(const scalar *x, const scalar *packed, const scalar *bias, const scalar *residual,
            scalar *out, int64_t num_rows, int64_t num_outputs, int64_t num_inputs, Coming *coming,
            int num_threads);
