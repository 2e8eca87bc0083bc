// SPDX-License-Identifier: Apache-2.0
//
// Products with packed weights by the tile unit of a CPU that has AMX, in bfloat16: a tile of 16 rows is
// multiplied in the time that vectors take for one or two.
//
// Exactness: a row's sums are built up 32 inputs at a time by the same instructions in any batch, whatever
// number of rows the last tile has.

#include "products.h"

#if TILES

#include <sys/syscall.h>
#include <unistd.h>

#define STEP (PANEL * DEPTH)   // weights of a panel that a multiplication takes
#define STRIDE (PANEL * PAIR)  // weights from one pair of inputs to the next
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

int has_tiles(void) {
    static int known = -1;
    // The system keeps room for the tiles' state only for processes that ask for it.
    if (known < 0) known = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    return known;
}

// Tiles 0 and 1: sums of the first tile of rows, 2 and 3: of the second; 4 and 5: these rows, 6 and 7:
// weights.
static TileShapes shapes_of(int first, int second) {
    TileShapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.bytes[tile] = TILE_BYTES;
        shapes.rows[tile] = tile > 5 ? TILE_ROWS : tile < 2 || tile == 4 ? first : second;
    }
    return shapes;
}

// The products of a tile of rows, or of two, with a panel of weights. Of each step of the next panel the
// lines from `first` to `end` are fetched, half of them at a time: what is read now waits for them.
static inline __attribute__((always_inline)) void multiply(const int num, const scalar *const rows[2],
                                                           int64_t num_inputs, const scalar *panel,
                                                           const char *next, int first, int end,
                                                           float sums[2 * TILE_ROWS][PANEL]) {
    int64_t stride = num_inputs * (int64_t)sizeof(scalar);
    int middle = (first + end) / 2;
    _tile_zero(0);
    _tile_zero(1);
    if (num > 1) _tile_zero(2);
    if (num > 1) _tile_zero(3);
    for (int64_t at = 0; at < num_inputs; at += DEPTH, panel += STEP, next += STEP * sizeof *panel) {
        // Weights are not to be kept in the nearest cache, which has just room for the rows.
        _tile_stream_loadd(6, panel, STRIDE * sizeof(scalar));
        _tile_loadd(4, rows[0] + at, stride);
        _tile_dpbf16ps(0, 4, 6);
        fetch(next + first * LINE, middle - first, LINE);
        if (num > 1) _tile_loadd(5, rows[1] + at, stride);
        if (num > 1) _tile_dpbf16ps(2, 5, 6);
        _tile_stream_loadd(7, panel + TILE_ROWS * PAIR, STRIDE * sizeof(scalar));
        _tile_dpbf16ps(1, 4, 7);
        if (num > 1) _tile_dpbf16ps(3, 5, 7);
        fetch(next + middle * LINE, end - middle, LINE);
    }
    _tile_stored(0, sums[0], PANEL * sizeof(float));
    _tile_stored(1, sums[0] + TILE_ROWS, PANEL * sizeof(float));
    if (num > 1) _tile_stored(2, sums[TILE_ROWS], PANEL * sizeof(float));
    if (num > 1) _tile_stored(3, sums[TILE_ROWS] + TILE_ROWS, PANEL * sizeof(float));
}

// See `product`; `num_inputs` is a multiple of 32.
int tile_product(const scalar *x, const scalar *packed, const scalar *bias, const scalar *residual,
                 scalar *out, int64_t num_rows, int64_t num_outputs, int64_t num_inputs,
                 int num_threads) {
    int64_t num_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    int num_lines = STEP * sizeof *packed / LINE;
    int rest = (int)(num_rows - (num_tiles - 1) * TILE_ROWS);
    TileShapes whole = shapes_of(TILE_ROWS, TILE_ROWS);
    TileShapes last = num_tiles % 2 ? shapes_of(rest, rest) : shapes_of(TILE_ROWS, rest);
    int changes = num_tiles > 2 && rest < TILE_ROWS;
#pragma omp parallel num_threads(num_threads)
    {
        _tile_loadconfig(&last);
#pragma omp for nowait
        for (int64_t panel = 0; panel < num_outputs / PANEL; panel++)
            for (int64_t tile = 0; tile < num_tiles; tile += 2) {
                float sums[2 * TILE_ROWS][PANEL] __attribute__((aligned(LINE)));
                const scalar *weights = packed + panel * PANEL * num_inputs;
                const char *next = (const char *)(weights + PANEL * num_inputs);
                const scalar *first_row = x + tile * TILE_ROWS * num_inputs;
                const scalar *rows[2] = {first_row, first_row + TILE_ROWS * num_inputs};
                if (changes && tile == 0) _tile_loadconfig(&whole);
                if (changes && tile + 2 >= num_tiles) _tile_loadconfig(&last);
                // Only the first tiles find the panel not in the cache: all share in fetching the next.
                int first = (int)(num_lines * tile / num_tiles), end = num_lines;
                if (tile + 2 < num_tiles) end = (int)(num_lines * (tile + 2) / num_tiles);
                if (tile + 1 < num_tiles)
                    multiply(2, rows, num_inputs, weights, next, first, end, sums);
                else
                    multiply(1, rows, num_inputs, weights, next, first, end, sums);
                for (int64_t n = 0; n < 2 * TILE_ROWS && tile * TILE_ROWS + n < num_rows; n++)
                    for (int64_t half = 0; half < PANEL; half += LANES) {
                        int64_t column = panel * PANEL + half;
                        finish(loadf(sums[n] + half), bias, residual, out, column,
                               (tile * TILE_ROWS + n) * num_outputs + column);
                    }
            }
        _tile_release();
    }
    return 0;
}

#else

int has_tiles(void) { return 0; }

int tile_product(const scalar *x, const scalar *packed, const scalar *bias, const scalar *residual,
                 scalar *out, int64_t num_rows, int64_t num_outputs, int64_t num_inputs,
                 int num_threads) {
    return 1;
}

#endif
