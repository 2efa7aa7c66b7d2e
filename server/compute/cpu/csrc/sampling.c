// What sampling asks of whole rows of logits: the peak, a draw, the likeliest tokens. A row's answer depends on its own
// logits alone: sums go over blocks of tokens in their order.

#include "vec.h"

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256   // tokens that are summed together
#define BRANCH 64   // at least as many tokens: their largest logit shows whether any can be among the likeliest

// A row's largest logit, NaN if it has one, and the first token that has it.
static float row_peak(const float *x, int64_t vocabulary, int64_t *token) {
    const int64_t whole = vocabulary / 16 * 16;
    const vec rest = vload_part(x + whole, vocabulary - whole, -INFINITY);
    vec most = rest;
    uint32_t nan = mbits(vdiffers(rest, rest));
    for (int64_t i = 0; i < whole; i += 16) {
        const vec v = vload(x + i);
        most = vmax(most, v);
        nan |= mbits(vdiffers(v, v));
    }
    const float peak = vreduce_max(most);
    *token = 0;
    while (!nan && *token < vocabulary - 1 && x[*token] != peak) ++*token;
    return nan ? NAN : peak;
}

// Of logits [rows, vocabulary]: peaks [rows], tokens [rows].
void row_peaks(int64_t rows, int64_t vocabulary, const float *logits, float *peaks, int64_t *tokens, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) peaks[row] = row_peak(logits + row * vocabulary, vocabulary, tokens + row);
}

// 16 tokens from `first`; -inf past the end.
static inline vec load_logits(const float *x, int64_t vocabulary, int64_t first) {
    return vload_part(x + first, vocabulary - first, -INFINITY);
}

// exp((x - peak) / temperature), 0 for -inf.
static inline vec weigh(vec x, vec peak, vec temperature) {
    return vselect(vdiffers(x, vset1(-INFINITY)), exp_negative(vdiv(vsub(x, peak), temperature)), vzero());
}

// Sums of the weights of each block of tokens; returns all of it.
static double sum_blocks(const float *x, int64_t vocabulary, float peak, float temperature, double *sums) {
    const vec most = vset1(peak), heat = vset1(temperature);
    double total = 0;
    for (int64_t first = 0; first < vocabulary; first += BLOCK, sums++) {
        vec sum = vzero();
        for (int64_t i = first; i < first + BLOCK && i < vocabulary; i += 16) {
            sum = vadd(sum, weigh(load_logits(x, vocabulary, i), most, heat));
        }
        *sums = vreduce_add(sum);
        total += *sums;
    }
    return total;
}

// The token at which the weights' running sum passes u of their total. Never one that weighs nothing.
static int64_t draw(const float *x, int64_t vocabulary, float temperature, double u) {
    const int64_t blocks = (vocabulary + BLOCK - 1) / BLOCK;
    double sums[blocks], before = 0;
    int64_t token, block = 0;
    const float peak = row_peak(x, vocabulary, &token);
    const double target = u * sum_blocks(x, vocabulary, peak, temperature, sums);
    while (block < blocks - 1 && before + sums[block] <= target) before += sums[block++];
    for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK && i < vocabulary; i += 16) {
        float weights[16];
        vstore(weights, weigh(load_logits(x, vocabulary, i), vset1(peak), vset1(temperature)));
        for (int64_t j = 0; j < 16; j++) {
            if (weights[j] > 0) token = i + j;
            before += weights[j];
            if (before > target) return token;
        }
    }
    return token;
}

// Tokens [rows] drawn from softmax(logits / temperature), logits [rows, vocabulary], inverted at u [rows].
void draw_rows(int64_t rows, int64_t vocabulary, const float *logits, const float *temperatures, const double *u,
               int64_t *tokens, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        tokens[row] = draw(logits + row * vocabulary, vocabulary, temperatures[row], u[row]);
    }
}

// Larger logits have larger keys, and of equal ones the earlier token has.
static inline uint64_t key(float logit, int64_t token) {
    uint32_t bits;
    logit += 0.0f;  // -0 is 0
    memcpy(&bits, &logit, 4);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~token;
}

static int descending(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x < y) - (x > y);
}

// A logit that `width` tokens reach, or nearly the largest such; -inf where every token may be among them.
static float bound(const float *x, int64_t vocabulary, int64_t width, uint64_t *keys) {
    int64_t size = BRANCH;  // few branches are sorted faster, and if they are many more than `width`, few tokens pass
    while (vocabulary / (2 * size) >= 8 * width) size *= 2;
    const int64_t branches = (vocabulary + size - 1) / size;
    if (branches <= width) return -INFINITY;
    for (int64_t branch = 0; branch < branches; branch++) {
        vec most = vset1(-INFINITY);
        for (int64_t i = 0; i < size; i += 16) {
            most = vmax(load_logits(x, vocabulary, branch * size + i), most);
        }
        keys[branch] = key(vreduce_max(most), branch);
    }
    qsort(keys, branches, sizeof(*keys), descending);
    const uint32_t bits = (uint32_t)(keys[width - 1] >> 32), raw = bits >> 31 ? bits & 0x7fffffffu : ~bits;
    float found;
    memcpy(&found, &raw, 4);
    return found;
}

// The `width` or more likeliest tokens, in keys, the likeliest first; returns how many. A row with a NaN has fewer.
static int64_t order(const float *x, int64_t vocabulary, int64_t width, uint64_t *keys) {
    const float least = bound(x, vocabulary, width, keys);
    int64_t count = 0;
    for (int64_t i = 0; i < vocabulary; i += 16) {
        uint32_t in = mbits(vgreater_equal(load_logits(x, vocabulary, i), vset1(least)));
        for (; in; in &= in - 1) {
            const int64_t at = i + __builtin_ctz(in);
            if (at < vocabulary) keys[count++] = key(x[at], at);
        }
    }
    qsort(keys, count, sizeof(*keys), descending);
    return count;
}

static inline int64_t token_of(uint64_t key) { return (int64_t)(uint32_t)~key; }

static void top(const float *x, int64_t vocabulary, float temperature, int64_t width, float *probs, int64_t *tokens,
                uint64_t *keys) {
    double sums[(vocabulary + BLOCK - 1) / BLOCK];
    int64_t token;
    const float peak = row_peak(x, vocabulary, &token);
    const int64_t count = order(x, vocabulary, width, keys);
    const double total = sum_blocks(x, vocabulary, peak, temperature, sums);
    for (int64_t i = 0; i < width; i++) {  // a row with a NaN has fewer, and is not used
        tokens[i] = i < count ? token_of(keys[i]) : 0;
        const vec weight = weigh(vset1(x[tokens[i]]), vset1(peak), vset1(temperature));
        probs[i] = i < count ? (float)(vfirst(weight) / total) : 0;
    }
}

// The `width` likeliest tokens [rows, width] of softmax(logits / temperature) and their probabilities, the likeliest
// first. scratch: one word of 64 bits for each token and thread.
void top_rows(int64_t rows, int64_t vocabulary, const float *logits, const float *temperatures, int64_t width,
              float *probs, int64_t *tokens, uint64_t *scratch, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        top(logits + row * vocabulary, vocabulary, temperatures[row], width, probs + row * width, tokens + row * width,
            scratch + omp_get_thread_num() * vocabulary);
    }
}

// How many tokens have a larger logit.
static int64_t count_above(const float *x, int64_t vocabulary, float logit) {
    const vec own = vset1(logit);
    int64_t count = 0;
    for (int64_t i = 0; i < vocabulary; i += 16) {
        count += __builtin_popcount(mbits(vless(own, load_logits(x, vocabulary, i))));
    }
    return count;
}

// By softmax(logits [rows, vocabulary]): log probability (NaN in a row that is not finite) and rank of tokens [rows], and
// of the `width` likeliest tokens [rows, width], the likeliest first. scratch: as for top_rows.
void score_rows(int64_t rows, int64_t vocabulary, const float *logits, const int64_t *tokens, int64_t width,
                float *logprobs, int64_t *ranks, float *likely_logprobs, int64_t *likely, uint64_t *scratch, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float *x = logits + row * vocabulary;
        uint64_t *keys = scratch + omp_get_thread_num() * vocabulary;
        double sums[(vocabulary + BLOCK - 1) / BLOCK];
        int64_t token;
        const float peak = row_peak(x, vocabulary, &token);
        const double total = isfinite(peak) ? peak + log(sum_blocks(x, vocabulary, peak, 1, sums)) : NAN;
        logprobs[row] = (float)(x[tokens[row]] - total);
        ranks[row] = 1 + count_above(x, vocabulary, x[tokens[row]]);
        const int64_t count = width ? order(x, vocabulary, width, keys) : 0;
        for (int64_t i = 0; i < width; i++) {
            likely[row * width + i] = i < count ? token_of(keys[i]) : 0;
            likely_logprobs[row * width + i] = (float)(x[likely[row * width + i]] - total);
        }
    }
}
