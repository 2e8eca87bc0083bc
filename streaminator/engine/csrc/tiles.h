// SPDX-License-Identifier: Apache-2.0
//
// The tile unit of a CPU that has AMX: eight tiles of at most 16 rows of 64 bytes, whose shapes each thread
// sets before it uses them. A multiplication by fewer rows takes less time, but for what all have in common.

#pragma once

#include "vectors.h"

#define TILE_ROWS 16
#define TILE_BYTES 64

// Whether there is such a unit, and this process may use it.
int has_tiles(void);

// Have lines fetched that lie `stride` bytes apart.
static inline __attribute__((always_inline)) void fetch(const void *at, int num, int stride) {
#pragma GCC unroll 16
    for (int line = 0; line < num; line++)
        __builtin_prefetch((const char *)at + line * stride, 0, 2);
}

#if BF16 && defined __AMX_BF16__
#define TILES 1

// Compilers are not told what memory the unit reads: all is to be written by now.
#define WRITTEN __asm__ volatile("" ::: "memory")

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileShapes;
#else
#define TILES 0
#endif
