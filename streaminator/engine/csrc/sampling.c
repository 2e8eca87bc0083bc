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

// e^(x * scale) for x up to 0, as exact as float32's x * scale; 0 where that is below 2^-126, NaN for
// NaN. A minimax polynomial of 2^r. Beside `exp_of`, which is also for numbers above 0, because a row of a
// large vocabulary takes a fifth longer with that.
static inline vec exp_below(vec x, float scale) {
    x *= scale * 1.44269504f;
    ints is_zero = x < -126.0f;
    vec shifted = x + 12582912.0f;  // rounds to a whole number in the low bits
    vec r = x - (shifted - 12582912.0f);
    vec p = spread(1.32764720e-3f);
    p = p * r + 9.67554133e-3f;
    p = p * r + 5.55071327e-2f;
    p = p * r + 2.40221197e-1f;
    p = p * r + 6.93146967e-1f;
    p = p * r + 1.00000007f;
    p *= (vec)(((bits)shifted << 23) + (127u << 23));
    return choose(is_zero, spread(0), p);
}

// A row, and the sums that it is drawn by.
typedef struct {
    const scalar *logits;
    int64_t size;
    float temperature;  // 1 where the most likely token is taken
    float most;         // the largest logit
    double whole;       // sum of e^(x - most)
    double rest;        // sum of e^((x - most) / temperature) of those that are no candidates
} Row;

// The candidates of a row: by logit, among equal ones by id.
typedef struct {
    int64_t num;
    int32_t *ids, *orders;  // ascending ids; room for a row and LANES more
    float edge;             // the least logit
    int32_t last;           // and the last candidate that has it
} Candidates;

// Sums up what is below `floor`, and lists the others; returns how many these are.
static int64_t sum_below(Row *row, float floor, Candidates *listed) {
    int64_t size = row->size, count = 0;
    float sharpness = 1 / row->temperature;
    for (int64_t tile = 0; tile < size; tile += TILE) {
        vec whole = {0}, rest = {0};
        for (int64_t at = tile; at < size && at < tile + TILE; at += LANES) {
            vec x = logits_at(row->logits, at, size);
            ints is_above = x >= floor;
            uint32_t lanes = lanes_of(is_above);
            if (lanes) {
                ints order = order_of(x);
                for (; lanes; lanes &= lanes - 1) {
                    int lane = __builtin_ctz(lanes);
                    if (at + lane >= size) break;
                    listed->ids[count] = (int32_t)(at + lane);
                    listed->orders[count++] = order[lane];
                }
                x = choose(is_above, spread(-INFINITY), x);
            }
            whole += exp_below(x - row->most, 1);
            if (sharpness != 1) rest += exp_below(x - row->most, sharpness);
        }
        row->whole += sum_of(whole);
        row->rest += sum_of(sharpness != 1 ? rest : whole);
    }
    return count;
}

static double weight_of(const Row *row, int32_t order) {
    // Divided in float32, as PyTorch does it.
    return exp((double)(value_of(order) / row->temperature) - row->most / row->temperature);
}

// Keeps the `num` largest of `count` listed tokens; adds all of them to `whole`, the others to `rest`.
static void choose_candidates(Row *row, int64_t count, int64_t num, Candidates *found) {
    for (int lane = 0; lane < LANES; lane++) found->orders[count + lane] = LOWEST;
    int32_t edge = find_edge(found->orders, count, num);
    int64_t room = num, kept = 0;
    for (int64_t at = 0; at < count; at++) room -= found->orders[at] > edge;
    for (int64_t at = 0; at < count; at++) {
        int32_t order = found->orders[at];
        row->whole += exp((double)value_of(order) - row->most);
        if (order < edge || (order == edge && room-- <= 0)) {
            row->rest += weight_of(row, order);
            continue;
        }
        if (order == edge) found->last = found->ids[at];
        found->ids[kept] = found->ids[at];
        found->orders[kept++] = order;
    }
    found->num = kept;
    found->edge = value_of(edge);
}

// (x - most) / temperature of LANES tokens, -inf for those that are found.
static inline vec rest_at(const Row *row, int64_t at, const Candidates *found) {
    vec x = logits_at(row->logits, at, row->size);
    ints is_early = numbered() + (int32_t)at <= found->last;
    ints is_found = (x > found->edge) | ((x == found->edge) & is_early);
    return choose(is_found, spread(-INFINITY), (x - row->most) / row->temperature);
}

// One of the tokens that are not found, by the inverse of their cumulative distribution.
static int64_t draw_from_rest(const Row *row, const Candidates *found, double uniform) {
    int64_t size = row->size;
    wide sums[2] = {0}, terms[2];
    for (int64_t at = 0; at < size; at += LANES) {
        exp_both(rest_at(row, at, found), terms);
        sums[0] += terms[0];
        sums[1] += terms[1];
    }
    double bound = 0, sum = 0;
    for (int lane = 0; lane < LANES; lane++) bound += ((double *)sums)[lane] * uniform;
    int64_t token = 0;
    for (int64_t at = 0; at < size; at += LANES) {
        exp_both(rest_at(row, at, found), terms);
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

// The largest logit of each of `NUM_GROUPS` groups. NaN is passed over here, and makes the sums NaN.
static void find_largest(const scalar *logits, int64_t size, vec *largest) {
    for (int part = 0; part < NUM_GROUPS / LANES; part++) largest[part] = spread(-INFINITY);
    for (int64_t at = 0; at < size; at += LANES) {
        vec *group = largest + at / LANES % (NUM_GROUPS / LANES);
        *group = larger(logits_at(logits, at, size), *group);
    }
}

static void sample_row(const scalar *logits, const Way *way, uint64_t key, uint64_t position,
                       Candidates *found, int64_t *token, float *logprob, int64_t *top_ids,
                       float *top_probs) {
    vec largest[NUM_GROUPS / LANES];
    ints orders[NUM_GROUPS / LANES];
    find_largest(logits, way->size, largest);
    for (int part = 0; part < NUM_GROUPS / LANES; part++) orders[part] = order_of(largest[part]);
    int32_t first = find_edge((int32_t *)orders, NUM_GROUPS, 1);
    Row row = {.logits = logits, .size = way->size, .most = value_of(first)};
    row.temperature = way->temperature > 0 ? way->temperature : 1;
    // Of each group one logit is known: so many are not below this.
    int32_t floor = find_edge((int32_t *)orders, NUM_GROUPS, way->num_candidates);
    int64_t count = sum_below(&row, value_of(floor), found);
    choose_candidates(&row, count, way->num_candidates, found);
    double log_total = row.most + log(row.whole);
    // A row with NaN may have listed fewer than there should be; it ends here.
    if (!isfinite(log_total)) {
        *token = -1;
        *logprob = NAN;
        for (int64_t at = 0; at < way->num_top; at++) {
            top_ids[at] = at;
            top_probs[at] = NAN;
        }
        return;
    }
    double weights[MOST_CANDIDATES], total = row.rest;
    for (int64_t at = found->num - 1; at >= 0; at--) {
        if (found->orders[at] == first) *token = found->ids[at];
        weights[at] = weight_of(&row, found->orders[at]);
        total += weights[at];
    }
    if (way->temperature > 0) {
        // The largest log p + g, which is the least -log u / p.
        uint64_t place = mix(key + position * 0x9E3779B97F4A7C15);
        double least = INFINITY;
        for (int64_t at = 0; at < found->num; at++) {
            double time = -log(uniform(place, found->ids[at])) / weights[at];
            if (time < least) {
                least = time;
                *token = found->ids[at];
            }
        }
        if (-log(uniform(place, REST)) / row.rest < least)
            *token = draw_from_rest(&row, found, uniform(place, WITHIN_REST));
    }
    *logprob = (float)(get(logits[*token]) - log_total);
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
