// SPDX-License-Identifier: Apache-2.0
//
// Vectors of floats as wide as the processor's registers (wider ones the compiler keeps in memory), and
// weights of the type that is compiled for (-DBF16=0|1).

#pragma once

#ifdef __AVX__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined __AVX512F__
#define LANES 16
#elif defined __AVX__
#define LANES 8
#else
#define LANES 4
#endif

#define LINE 64  // bytes of a cache line

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#if BF16
typedef uint16_t scalar;

static inline vec load(const scalar *at) {
    halves read;
    memcpy(&read, at, sizeof read);
    return (vec)(__builtin_convertvector(read, bits) << 16);
}

#ifdef __AVX512BF16__
// What is smaller than the least normal number becomes 0.
static inline halves narrow(vec x) { return (halves)_mm512_cvtneps_pbh((__m512)x); }
#else
static inline halves narrow(vec x) {
    bits raw = (bits)x, nearest = raw + 0x7fff + ((raw >> 16) & 1);
    bits is_nan = (bits)(x != x);
    return __builtin_convertvector(((nearest & ~is_nan) | (0x7fc00000u & is_nan)) >> 16, halves);
}
#endif

static inline vec rounded(vec x) {
    return (vec)(__builtin_convertvector(narrow(x), bits) << 16);
}

static inline void store(scalar *at, vec x) {
    halves write = narrow(x);
    memcpy(at, &write, sizeof write);
}

static inline float get(scalar x) {
    uint32_t raw = (uint32_t)x << 16;
    float value;
    memcpy(&value, &raw, sizeof value);
    return value;
}
#else
typedef float scalar;

static inline vec load(const scalar *at) {
    vec read;
    memcpy(&read, at, sizeof read);
    return read;
}

static inline vec rounded(vec x) { return x; }

static inline void store(scalar *at, vec x) { memcpy(at, &x, sizeof x); }

static inline float get(scalar x) { return x; }
#endif

static inline vec loadf(const float *at) {
    vec read;
    memcpy(&read, at, sizeof read);
    return read;
}

static inline void storef(float *at, vec x) { memcpy(at, &x, sizeof x); }

static inline vec spread(float x) { return x - (vec){0}; }

static inline vec choose(ints where, vec a, vec b) {
    return (vec)(((bits)a & (bits)where) | ((bits)b & ~(bits)where));
}

// 0, 1, 2 and so on.
static inline ints numbered(void) {
    ints lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    return lanes;
}

// A bit for each lane of a comparison.
static inline uint32_t lanes_of(ints where) {
#if defined __AVX512F__
    return _mm512_cmplt_epi32_mask((__m512i)where, _mm512_setzero_si512());
#elif defined __AVX__
    return (uint32_t)_mm256_movemask_ps((__m256)where);
#else
    uint32_t lanes = 0;
    for (int lane = 0; lane < LANES; lane++) lanes |= (uint32_t)(where[lane] & 1) << lane;
    return lanes;
#endif
}

static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

static float sum_of(vec x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

static float largest_of(vec x) {
    float most = x[0];
    for (int lane = 1; lane < LANES; lane++) most = x[lane] > most ? x[lane] : most;
    return most;
}

// e^x within about an ulp; exactly 0 below -87, so that masked keys add nothing (Cephes, expf).
static inline vec exp_of(vec x) {
    ints is_zero = x < -87.0f;
    x = choose(x > 88.0f, spread(88.0f), choose(is_zero, spread(-87.0f), x));
    vec shifted = x * 1.44269504f + 12582912.0f;  // rounds to a whole number in the low bits
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = spread(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ints power = __builtin_convertvector(n, ints);
    vec result = p * (vec)((power + 127) << 23);
    return choose(is_zero, spread(0), result);
}

// Numbers that a multiplication takes at a time: in bfloat16 two, which lie side by side.
#define PAIR (BF16 ? 2 : 1)

// What pairs are multiplied with. Where there is no multiplication of pairs these become floats once, since
// they are used again and again.
#if BF16 && !defined __AVX512BF16__
typedef float factor;

static inline factor factor_of(scalar x) { return get(x); }

// Of numbers that are `rounded`.
static inline void store_factors(factor *at, vec x) { storef(at, x); }
#else
typedef scalar factor;

static inline factor factor_of(scalar x) { return x; }

static inline void store_factors(factor *at, vec x) { store(at, x); }
#endif

// LANES pairs, as they are multiplied.
#if BF16 && defined __AVX512BF16__
typedef __m512bh pairs;

static inline pairs pairs_at(const scalar *at) { return (pairs)_mm512_loadu_si512(at); }

// sum + the products of pairs with the pair at `x`, in this order.
static inline vec add_products(vec sum, pairs many, const factor *x) {
    int32_t both;
    memcpy(&both, x, sizeof both);
    return (vec)_mm512_dpbf16_ps((__m512)sum, many, (pairs)_mm512_set1_epi32(both));
}
#elif BF16
typedef struct {
    vec first, second;
} pairs;

static inline pairs pairs_at(const scalar *at) {
    bits many;
    memcpy(&many, at, sizeof many);
    return (pairs){(vec)(many << 16), (vec)(many & 0xffff0000u)};
}

static inline vec add_products(vec sum, pairs many, const factor *x) {
    sum += many.first * x[0];
    return sum + many.second * x[1];
}
#else
typedef vec pairs;

static inline pairs pairs_at(const scalar *at) {
    vec read = load(at);
#if defined __AVX__ && !defined __AVX512F__
    // Else it would be loaded anew for each row.
    __asm__("" : "+x"(read));
#endif
    return read;
}

static inline vec add_products(vec sum, pairs many, const factor *x) { return sum + many * *x; }
#endif
