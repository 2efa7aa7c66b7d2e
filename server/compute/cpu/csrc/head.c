// The output layer on Intel AMX: logits of the sampled rows, float32. Its weights are read where they lie, [vocabulary, in]
// bf16 (they may be the embedding's), once for every 16 rows; scores come out by vocabulary and are turned around.

#include "kernels.h"
#include "tiles.h"

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define ROWS 16

// x [rows, in], 16 rows from `first`, as tiles of pairs: [in / 2, 16, 2].
static void pack(const uint16_t *x, int64_t rows, int64_t in, int64_t first, uint16_t *packed) {
    for (int64_t k = 0; k < in; k += 32) {
        __m512i words[16];
        for (int64_t i = 0; i < 16; i++) {
            words[i] = first + i < rows ? _mm512_loadu_si512(x + (first + i) * in + k) : _mm512_setzero_si512();
        }
        transpose(words);
        for (int64_t i = 0; i < 16; i++) _mm512_storeu_si512(packed + (k / 2 + i) * 32, words[i]);
    }
}

static inline void turn(const float *scores, int64_t rows, int64_t vocabulary, float *logits) {
    __m512i words[16];
    for (int i = 0; i < 16; i++) words[i] = _mm512_load_si512(scores + i * 16);
    transpose(words);
    for (int64_t row = 0; row < rows; row++) _mm512_storeu_si512(logits + row * vocabulary, words[row]);
}

// 64 tokens from `first` for up to 16 rows.
static void score(int64_t first, int64_t rows, int64_t vocabulary, int64_t in, const uint16_t *weight,
                  const uint16_t *packed, float *logits) {
    float scores[4 * 256] __attribute__((aligned(64)));
    const uint16_t *w = weight + first * in;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < in; k += 32) {
        _tile_loadd(4, packed + k * 16, 64);
        _tile_loadd(5, w + k, in * 2);
        _tile_dpbf16ps(0, 5, 4);
        _tile_loadd(6, w + 16 * in + k, in * 2);
        _tile_dpbf16ps(1, 6, 4);
        _tile_loadd(7, w + 32 * in + k, in * 2);
        _tile_dpbf16ps(2, 7, 4);
        _tile_loadd(5, w + 48 * in + k, in * 2);
        _tile_dpbf16ps(3, 5, 4);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + 256, 64);
    _tile_stored(2, scores + 512, 64);
    _tile_stored(3, scores + 768, 64);
    for (int64_t i = 0; i < 4; i++) turn(scores + i * 256, rows, vocabulary, logits + first + i * 16);
}

void head_share(int64_t rows, int64_t vocabulary, int64_t in, const uint16_t *x, const uint16_t *weight,
                uint16_t *packed, float *logits) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row += ROWS) pack(x, rows, in, row, packed + row * in);
    whole_tiles();
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < (vocabulary + 63) / 64; block++) {
        // The last 64 tokens may have been done in part already, with the same result.
        const int64_t first = block * 64 + 64 <= vocabulary ? block * 64 : vocabulary - 64;
        for (int64_t row = 0; row < rows; row += ROWS) {
            score(first, rows - row < ROWS ? rows - row : ROWS, vocabulary, in, weight, packed + row * in,
                  logits + row * vocabulary);
        }
    }
    _tile_release();
}
