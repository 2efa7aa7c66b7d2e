// What sampling asks of whole rows of logits: the peak, a draw, the likeliest tokens. A row's answer depends on its own
// logits alone: sums go over blocks of tokens in their order.

#include "tiles.h"

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256   // tokens that are summed together
#define BRANCH 64   // tokens whose largest logit is looked at, to tell what cannot be among the likeliest

// A row's largest logit, NaN if it has one, and the first token that has it.
static float row_peak(const float *x, int64_t vocabulary, int64_t *token) {
    const int64_t whole = vocabulary / 16 * 16;
    const __mmask16 left = (__mmask16)((1 << (vocabulary - whole)) - 1);
    const __m512 least = _mm512_set1_ps(-INFINITY), rest = _mm512_mask_loadu_ps(least, left, x + whole);
    __m512 most = rest;
    __mmask16 nan = _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q);
    for (int64_t i = 0; i < whole; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        most = _mm512_max_ps(most, v);
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    const float peak = _mm512_reduce_max_ps(most);
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
static inline __m512 load_logits(const float *x, int64_t vocabulary, int64_t first) {
    const int64_t left = vocabulary - first;
    const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
    return _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), there, x + first);
}

// exp((x - peak) / temperature), 0 for -inf.
static inline __m512 weigh(__m512 x, __m512 peak, __m512 temperature) {
    const __mmask16 possible = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    return _mm512_maskz_mov_ps(possible, exp_negative(_mm512_div_ps(_mm512_sub_ps(x, peak), temperature)));
}

// Sums of the weights of each block of tokens; returns all of it.
static double sum_blocks(const float *x, int64_t vocabulary, float peak, float temperature, double *sums) {
    const __m512 most = _mm512_set1_ps(peak), heat = _mm512_set1_ps(temperature);
    double total = 0;
    for (int64_t first = 0; first < vocabulary; first += BLOCK, sums++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = first; i < first + BLOCK && i < vocabulary; i += 16) {
            sum = _mm512_add_ps(sum, weigh(load_logits(x, vocabulary, i), most, heat));
        }
        *sums = _mm512_reduce_add_ps(sum);
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
        _mm512_storeu_ps(weights, weigh(load_logits(x, vocabulary, i), _mm512_set1_ps(peak), _mm512_set1_ps(temperature)));
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
    const int64_t branches = (vocabulary + BRANCH - 1) / BRANCH;
    if (branches <= width) return -INFINITY;
    for (int64_t branch = 0; branch < branches; branch++) {
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (int64_t i = 0; i < BRANCH; i += 16) {
            most = _mm512_max_ps(load_logits(x, vocabulary, branch * BRANCH + i), most);
        }
        keys[branch] = key(_mm512_reduce_max_ps(most), branch);
    }
    qsort(keys, branches, sizeof(*keys), descending);
    const uint32_t bits = (uint32_t)(keys[width - 1] >> 32), raw = bits >> 31 ? bits & 0x7fffffffu : ~bits;
    float found;
    memcpy(&found, &raw, 4);
    return found;
}

static void top(const float *x, int64_t vocabulary, float temperature, int64_t width, float *probs, int64_t *tokens,
                uint64_t *keys) {
    double sums[(vocabulary + BLOCK - 1) / BLOCK];
    int64_t token, count = 0;
    const float peak = row_peak(x, vocabulary, &token), least = bound(x, vocabulary, width, keys);
    const double total = sum_blocks(x, vocabulary, peak, temperature, sums);
    for (int64_t i = 0; i < vocabulary; i += 16) {
        __mmask16 in = _mm512_cmp_ps_mask(load_logits(x, vocabulary, i), _mm512_set1_ps(least), _CMP_GE_OQ);
        for (; in; in &= in - 1) {
            const int64_t at = i + __builtin_ctz(in);
            if (at < vocabulary) keys[count++] = key(x[at], at);
        }
    }
    qsort(keys, count, sizeof(*keys), descending);
    for (int64_t i = 0; i < width; i++) {  // a row with a NaN has fewer, and is not used
        tokens[i] = i < count ? (int64_t)(uint32_t)~keys[i] : 0;
        const __m512 weight = weigh(_mm512_set1_ps(x[tokens[i]]), _mm512_set1_ps(peak), _mm512_set1_ps(temperature));
        probs[i] = i < count ? (float)(_mm512_cvtss_f32(weight) / total) : 0;
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
