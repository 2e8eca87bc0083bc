// SPDX-License-Identifier: Apache-2.0
//
// What `layers.c` uses of `products.c`.

#include "tiles.h"

#define PIECE 128  // lines that are fetched from one place
#define ROWS 8     // rows that a tile of a product has
#define PANEL 32   // and its outputs
#define DEPTH 32   // inputs that a tile unit multiplies at a time

// Places in memory that will be read soon, PIECE lines each, the first ones first.
typedef struct {
    const char **pieces;
    int64_t num;
} Coming;

// Add bias [columns] and residual, where there are such, to a vector of sums, and store it.
static inline void finish(vec sum, const scalar *bias, const scalar *residual, scalar *out,
                          int64_t column, int64_t at) {
    if (bias) sum += load(bias + column);
    if (residual) sum += load(residual + at);
    store(out + at, sum);
}

// Takes the place of `product` for multiples of DEPTH inputs where `has_tiles`.
int tile_product(const scalar *x, const scalar *packed, const scalar *bias, const scalar *residual,
                 scalar *out, int64_t num_rows, int64_t num_outputs, int64_t num_inputs,
                 int num_threads);

// Tiles behind the second, which leave the memory idle; the tile unit hardly ever does.
static inline int64_t num_idle_tiles(int64_t num_rows) {
    int64_t num_tiles = (num_rows + ROWS - 1) / ROWS;
    return num_tiles > 2 && !has_tiles() ? num_tiles - 2 : 0;
}

int product(const scalar *x, const scalar *packed, const scalar *bias, const scalar *residual,
            scalar *out, int64_t num_rows, int64_t num_outputs, int64_t num_inputs, Coming *coming,
            int num_threads);
