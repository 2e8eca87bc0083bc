// SPDX-License-Identifier: Apache-2.0
//
// Draws a token for each row of logits, as `sampler.py` does it without filters: candidates one by
// one, all others as one event. Compiled by `compile_kernels.py` for one type of logits: -DBF16=0|1.
//
// Exactness: one thread computes a row, from nothing but the row.

#include "vectors.h"

#define MOST_CANDIDATES 64
#define NUM_GROUPS (16 * LANES)
#define TILE (16 * LANES)  // what is summed up in float32; the sums are added in float64

// Take a token's place in the hash; see `sampler.py`.
#define REST -1
#define WITHIN_REST -2

#define ORDER_BITS (BF16 ? 16 : 32)
#define BELOW_SIGN ((int32_t)(((int64_t)1 << (ORDER_BITS - 1)) - 1))
#define LOWEST (-BELOW_SIGN - 1)

// Whole numbers in the order of x; -0 is 0.
static inline ints order_of(vec x) {
    ints raw = (ints)(x + 0.0f) >> (32 - ORDER_BITS);
    return raw ^ ((raw >> 31) & BELOW_SIGN);
}

static inline float value_of(int32_t order) {
    uint32_t raw = (uint32_t)(order ^ ((order >> 31) & BELOW_SIGN)) << (32 - ORDER_BITS);
    float value;
    memcpy(&value, &raw, sizeof value);
    return value;
}

// Logits `at` to `at + LANES`; -inf behind the end, which adds nothing.
static inline vec logits_at(const scalar *row, int64_t at, int64_t size) {
    if (at + LANES <= size) return load(row + at);
    vec x = spread(-INFINITY);
    for (int64_t lane = 0; at + lane < size; lane++) x[lane] = get(row[at + lane]);
    return x;
}

// The largest number that `num` of the `count` orders are not below; whole vectors are read.
static int32_t find_edge(const int32_t *orders, int64_t count, int64_t num) {
    int64_t edge = LOWEST;
    for (int bit = ORDER_BITS - 1; bit >= 0; bit--) {
        int64_t next = edge + ((int64_t)1 << bit), reached = 0;
        for (int64_t at = 0; at < count; at += LANES) {
            ints order;
            memcpy(&order, orders + at, sizeof order);
            reached += __builtin_popcount(lanes_of(order >= (int32_t)next));
        }
        if (reached >= num) edge = next;
    }
    return (int32_t)edge;
}

typedef float half __attribute__((vector_size(2 * LANES)));
typedef double wide __attribute__((vector_size(4 * LANES)));
typedef int64_t longs __attribute__((vector_size(4 * LANES)));

// e^x within about an ulp, for x up to 0; exactly 0 below -700.
static inline wide exp_wide(wide x) {
    longs is_zero = x < -700.0;
    x = (wide)((longs)x & ~is_zero);
    wide shifted = x * 1.4426950408889634 + 0x1.8p52;  // rounds to a whole number in the low bits
    wide n = shifted - 0x1.8p52;
    wide r = x - n * 0x1.62e42fee00000p-1 - n * 0x1.a39ef35793c76p-33;
    wide p = r * (1 / 6227020800.0) + 1 / 479001600.0;
    p = p * r + 1 / 39916800.0;
    p = p * r + 1 / 3628800.0;
    p = p * r + 1 / 362880.0;
    p = p * r + 1 / 40320.0;
    p = p * r + 1 / 5040.0;
    p = p * r + 1 / 720.0;
    p = p * r + 1 / 120.0;
    p = p * r + 1 / 24.0;
    p = p * r + 1 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    p *= (wide)(((longs)shifted + 1023) << 52);
    return (wide)((longs)p & ~is_zero);
}

// e^x in float64.
static inline void exp_both(vec x, wide out[2]) {
    half parts[2];
    memcpy(parts, &x, sizeof x);
    for (int part = 0; part < 2; part++)
        out[part] = exp_wide(__builtin_convertvector(parts[part], wide));
}

// SplitMix64's finaliser (Steele, Lea and Flood 2014).
static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

static double uniform(uint64_t place, int64_t token) {
    uint64_t bits = mix(place + (uint64_t)(token + 2) * 0xD1342543DE82EF95);
    return ((double)(bits >> 12) + 0.5) * 0x1p-52;
}

// The candidates of a row: by logit, among equal ones by id.
typedef struct {
    int64_t num;
    int32_t *ids, *orders;  // ascending ids; room for a row and LANES more
    float edge;             // the least logit
    int32_t last;           // and the last candidate that has it
} Candidates;

static void find_candidates(const scalar *row, int64_t size, const int32_t *largest, int64_t num,
                            Candidates *found) {
    // Of each group one logit is known: so many are not below this.
    int32_t floor = find_edge(largest, NUM_GROUPS, num);
    int64_t count = 0;
    for (int64_t at = 0; at < size; at += LANES) {
        ints order = order_of(logits_at(row, at, size));
        for (uint32_t lanes = lanes_of(order >= floor); lanes; lanes &= lanes - 1) {
            int lane = __builtin_ctz(lanes);
            if (at + lane >= size) break;
            found->ids[count] = (int32_t)(at + lane);
            found->orders[count++] = order[lane];
        }
    }
    for (int lane = 0; lane < LANES; lane++) found->orders[count + lane] = LOWEST;
    int32_t edge = find_edge(found->orders, count, num);
    int64_t room = num, kept = 0;
    for (int64_t at = 0; at < count; at++) room -= found->orders[at] > edge;
    for (int64_t at = 0; at < count; at++) {
        int32_t order = found->orders[at];
        if (order < edge || (order == edge && room-- <= 0)) continue;
        if (order == edge) found->last = found->ids[at];
        found->ids[kept] = found->ids[at];
        found->orders[kept++] = order;
    }
    found->num = kept;
    found->edge = value_of(edge);
}

// x / temperature - top of LANES tokens, -inf for those that are found.
static inline vec rest_at(const scalar *row, int64_t at, int64_t size, float temperature, float top,
                          const Candidates *found) {
    vec x = logits_at(row, at, size);
    ints is_early = numbered() + (int32_t)at <= found->last;
    ints is_found = (x > found->edge) | ((x == found->edge) & is_early);
    return choose(is_found, spread(-INFINITY), x / temperature - top);
}

// Sum of e^(x / temperature - top) of all tokens that are not found.
static double sum_rest(const scalar *row, int64_t size, float temperature, float top,
                       const Candidates *found) {
    double sum = 0;
    for (int64_t tile = 0; tile < size; tile += TILE) {
        vec part = {0};
        for (int64_t at = tile; at < size && at < tile + TILE; at += LANES)
            part += exp_of(rest_at(row, at, size, temperature, top, found));
        sum += sum_of(part);
    }
    return sum;
}

// One of the tokens that are not found, by the inverse of their cumulative distribution.
static int64_t draw_from_rest(const scalar *row, int64_t size, float temperature, float top,
                              const Candidates *found, double uniform) {
    wide sums[2] = {0}, terms[2];
    for (int64_t at = 0; at < size; at += LANES) {
        exp_both(rest_at(row, at, size, temperature, top, found), terms);
        sums[0] += terms[0];
        sums[1] += terms[1];
    }
    double bound = 0, sum = 0;
    for (int lane = 0; lane < LANES; lane++) bound += ((double *)sums)[lane] * uniform;
    int64_t token = 0;
    for (int64_t at = 0; at < size; at += LANES) {
        exp_both(rest_at(row, at, size, temperature, top, found), terms);
        for (int lane = 0; lane < LANES; lane++) {
            double term = ((double *)terms)[lane];
            sum += term;
            if (term > 0) token = at + lane;
            if (sum > bound) return token;
        }
    }
    return token;
}

typedef struct {
    int64_t size;             // V
    int64_t num_candidates;   // at most MOST_CANDIDATES
    int64_t num_top;          // M, at most num_candidates
    float temperature;        // 0: the most likely token
} Way;

static void sample_row(const scalar *row, const Way *way, uint64_t key, uint64_t position,
                       Candidates *found, int64_t *token, float *logprob, int64_t *top_ids,
                       float *top_probs) {
    int64_t size = way->size;
    float temperature = way->temperature > 0 ? way->temperature : 1;
    ints largest[NUM_GROUPS / LANES];
    for (int part = 0; part < NUM_GROUPS / LANES; part++) largest[part] = (ints){0} + LOWEST;
    for (int64_t at = 0; at < size; at += LANES) {
        ints *group = largest + at / LANES % (NUM_GROUPS / LANES);
        ints order = order_of(logits_at(row, at, size)), is_larger = order > *group;
        *group = (order & is_larger) | (*group & ~is_larger);
    }
    int32_t first = find_edge((int32_t *)largest, NUM_GROUPS, 1);
    float most = value_of(first), top = most / temperature;
    const Candidates none = {.edge = INFINITY, .last = -1};
    double log_total = most + log(sum_rest(row, size, 1, most, &none));
    if (!isfinite(log_total)) {
        *token = -1;
        *logprob = NAN;
        for (int64_t at = 0; at < way->num_top; at++) {
            top_ids[at] = at;
            top_probs[at] = NAN;
        }
        return;
    }
    find_candidates(row, size, (int32_t *)largest, way->num_candidates, found);
    double weights[MOST_CANDIDATES], total = 0;
    for (int64_t at = found->num - 1; at >= 0; at--) {
        if (found->orders[at] == first) *token = found->ids[at];
        weights[at] = exp((double)(get(row[found->ids[at]]) / temperature) - top);
        total += weights[at];
    }
    if (way->temperature > 0) {
        // The largest log p + g, which is the least -log u / p.
        uint64_t place = mix(key + position * 0x9E3779B97F4A7C15);
        double least = INFINITY, rest;
        for (int64_t at = 0; at < found->num; at++) {
            double time = -log(uniform(place, found->ids[at])) / weights[at];
            if (time < least) {
                least = time;
                *token = found->ids[at];
            }
        }
        rest = sum_rest(row, size, temperature, top, found);
        total += rest;
        if (-log(uniform(place, REST)) / rest < least)
            *token =
                draw_from_rest(row, size, temperature, top, found, uniform(place, WITHIN_REST));
    } else {
        total = exp(log_total - most);
    }
    *logprob = (float)(get(row[*token]) - log_total);
    for (int64_t at = 0; at < way->num_top; at++) {
        int64_t best = 0;
        for (int64_t other = 1; other < found->num; other++)
            if (found->orders[other] > found->orders[best]) best = other;
        top_ids[at] = found->ids[best];
        top_probs[at] = (float)(weights[best] / total);
        found->orders[best] = LOWEST;
    }
}

// Tokens and their log-probabilities [num_rows], likeliest tokens and their probabilities
// [num_rows, num_top] of logits [num_rows, size]. Returns 0, or 1 when there is no memory.
int sample(const scalar *logits, const uint64_t *keys, const uint64_t *positions, int64_t *tokens,
           float *logprobs, int64_t *top_ids, float *top_probs, int64_t num_rows, const Way *way,
           int num_threads) {
    int failed = 0;
#pragma omp parallel num_threads(num_threads) reduction(| : failed)
    {
        size_t room = (size_t)(way->size + LANES);
        Candidates found = {0};
        found.ids = malloc(room * sizeof *found.ids);
        found.orders = malloc(room * sizeof *found.orders);
        failed = !found.ids || !found.orders;
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < num_rows; row++)
            if (!failed)
                sample_row(logits + row * way->size, way, keys[row], positions[row], &found,
                           tokens + row, logprobs + row, top_ids + row * way->num_top,
                           top_probs + row * way->num_top);
        free(found.ids);
        free(found.orders);
    }
    return failed;
}
