// SPDX-License-Identifier: Apache-2.0
//
// Products with packed weights by the tile unit of a CPU that has AMX, in bfloat16: a tile of 16 rows is
// multiplied in the time that vectors take for one or two.
//
// Exactness: a row's sums are built up 32 inputs at a time by the same instructions in any batch; rows
// that fill the last tile are 0 and are not stored.

#include "products.h"

#if BF16 && defined __AMX_BF16__

#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16                // rows of a tile, and its columns of floats
#define STEP (PANEL * DEPTH)   // weights of a panel that a multiplication takes
#define STRIDE (PANEL * PAIR)  // weights from one pair of inputs to the next
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

// Eight tiles of 16 rows of 64 bytes: 0 to 3 sums, 4 and 5 rows, 6 and 7 weights.
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} CONFIG = {
    .palette = 1,
    .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE},
};

int has_tiles(void) {
    static int known = -1;
    // The system keeps room for the tiles' state only for processes that ask for it.
    if (known < 0) known = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    return known;
}

// The products of a tile of rows, or of two, with a panel of weights. Of each step of the next panel the
// lines from `first` to `end` are fetched.
static inline __attribute__((always_inline)) void multiply(const int num, const scalar *const rows[2],
                                                           int64_t num_inputs, const scalar *panel,
                                                           const char *next, int first, int end,
                                                           float sums[2 * TILE][PANEL]) {
    int64_t stride = num_inputs * (int64_t)sizeof(scalar);
    _tile_zero(0);
    _tile_zero(1);
    if (num > 1) _tile_zero(2);
    if (num > 1) _tile_zero(3);
    for (int64_t at = 0; at < num_inputs; at += DEPTH, panel += STEP, next += STEP * sizeof *panel) {
        // Not to be kept in the nearest cache, which has just room for the rows.
        _tile_stream_loadd(6, panel, STRIDE * sizeof(scalar));
        _tile_stream_loadd(7, panel + TILE * PAIR, STRIDE * sizeof(scalar));
        _tile_loadd(4, rows[0] + at, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (num > 1) {
            _tile_loadd(5, rows[1] + at, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        for (int line = first; line < end; line++) __builtin_prefetch(next + line * LINE, 0, 2);
    }
    _tile_stored(0, sums[0], PANEL * sizeof(float));
    _tile_stored(1, sums[0] + TILE, PANEL * sizeof(float));
    if (num > 1) _tile_stored(2, sums[TILE], PANEL * sizeof(float));
    if (num > 1) _tile_stored(3, sums[TILE] + TILE, PANEL * sizeof(float));
}

// See `product`; `num_inputs` is a multiple of 32.
int tile_product(const scalar *x, const scalar *packed, const scalar *bias, const scalar *residual,
                 scalar *out, int64_t num_rows, int64_t num_outputs, int64_t num_inputs,
                 int num_threads) {
    int64_t num_whole = num_rows / TILE, num_tiles = (num_rows + TILE - 1) / TILE;
    int num_lines = STEP * sizeof *packed / LINE;
    scalar *last = NULL;
    if (num_tiles > num_whole) {
        last = calloc((size_t)(TILE * num_inputs), sizeof *last);
        if (!last) return 1;
        memcpy(last, x + num_whole * TILE * num_inputs,
               (size_t)((num_rows - num_whole * TILE) * num_inputs) * sizeof *last);
    }
#pragma omp parallel num_threads(num_threads)
    {
        _tile_loadconfig(&CONFIG);
#pragma omp for nowait
        for (int64_t panel = 0; panel < num_outputs / PANEL; panel++)
            for (int64_t tile = 0; tile < num_tiles; tile += 2) {
                float sums[2 * TILE][PANEL] __attribute__((aligned(LINE)));
                const scalar *weights = packed + panel * PANEL * num_inputs;
                const char *next = (const char *)(weights + PANEL * num_inputs);
                const scalar *rows[2];
                for (int64_t n = 0; n < 2; n++)
                    rows[n] = tile + n < num_whole ? x + (tile + n) * TILE * num_inputs : last;
                // Only the first tiles find the panel not in the cache: all share in fetching the next.
                int first = (int)(num_lines * tile / num_tiles), end = num_lines;
                if (tile + 2 < num_tiles) end = (int)(num_lines * (tile + 2) / num_tiles);
                if (tile + 1 < num_tiles)
                    multiply(2, rows, num_inputs, weights, next, first, end, sums);
                else
                    multiply(1, rows, num_inputs, weights, next, first, end, sums);
                for (int64_t n = 0; n < 2 * TILE && tile * TILE + n < num_rows; n++)
                    for (int64_t half = 0; half < PANEL; half += LANES) {
                        int64_t column = panel * PANEL + half;
                        finish(loadf(sums[n] + half), bias, residual, out, column,
                               (tile * TILE + n) * num_outputs + column);
                    }
            }
        _tile_release();
    }
    free(last);
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
