// The innermost products on Intel AMX.

#pragma once

#include <immintrin.h>
#include <stdint.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} TileConfig;

static inline void shape_tiles(TileConfig *config, int first, int end, int64_t rows, int64_t bytes_per_row) {
    config->palette = 1;
    for (int tile = first; tile < end; tile++) {
        config->rows[tile] = (uint8_t)rows;
        config->bytes_per_row[tile] = (uint16_t)bytes_per_row;
    }
}

// gcc's intrinsics do not say which memory they read, so the compiler may drop or delay stores that only tiles read. After
// this, what was stored is in memory.
static inline void stores_end(const void *stored) { __asm__ volatile("" : : "r"(stored) : "memory"); }

static inline void load_shapes(const TileConfig *config) {
    stores_end(config);
    _tile_loadconfig(config);
}

static inline void tiles_end(void) { _tile_release(); }

// NF4: blocks of 64 inputs by 32 outputs.

#define NF4_ROWS 64  // rows whose sums stay in the first level of the cache

typedef uint16_t Decoded;
#define DECODED 2048  // of a block: the tiles of outputs 0 to 15 and 16 to 31 for 32 inputs, then for the others

typedef ivec Nf4Table;

static inline Nf4Table nf4_table(const float *codes) {
    uint16_t table[32] = {0};
    vstore_bf16(table, vload(codes));
    return iload(table);
}

static inline void nf4_begin(int64_t rows) {
    TileConfig config = {0};
    shape_tiles(&config, 0, 6, rows < TILE_ROWS ? rows : TILE_ROWS, 64);
    shape_tiles(&config, 6, 8, TILE_ROWS, 64);
    load_shapes(&config);
}

static inline void nf4_decode(const uint8_t *packed, Nf4Table table, Decoded *tiles) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int part = 0; part < 2; part++, tiles += 1024) {
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; pair++, packed += 32) {
            __m256i bytes = _mm256_loadu_si256((const __m256i *)packed);
            __m256i low = _mm256_and_si256(bytes, nibble);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
            _mm512_store_si512(tiles + pair * 32, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(low), table));
            _mm512_store_si512(tiles + 512 + pair * 32, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(high), table));
        }
    }
}

// One block for up to 16 rows of x, `stride` values apart, into sums [rows][32]; all 16 are readable and writable.
static inline void nf4_multiply_tile(const uint16_t *x, int64_t stride, const Decoded *tiles, float *sums) {
    stores_end(tiles);
    _tile_zero(0);
    _tile_zero(1);
    for (int part = 0; part < 2; part++) {
        _tile_loadd(4, x + part * TILE_INPUTS, stride * 2);
        _tile_loadd(6, tiles + part * 1024, 64);
        _tile_loadd(7, tiles + part * 1024 + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
}

// The same for up to 32 rows: every tile that is loaded is used twice.
static inline void nf4_multiply_two(const uint16_t *x, int64_t stride, const Decoded *tiles, float *sums) {
    const uint16_t *below = x + TILE_ROWS * stride;
    stores_end(tiles);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int part = 0; part < 2; part++) {
        _tile_loadd(4, x + part * TILE_INPUTS, stride * 2);
        _tile_loadd(6, tiles + part * 1024, 64);
        _tile_loadd(7, tiles + part * 1024 + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below + part * TILE_INPUTS, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
}

static inline void nf4_multiply(int64_t rows, const uint16_t *x, int64_t stride, const Decoded *tiles, float *sums) {
    (rows > TILE_ROWS ? nf4_multiply_two : nf4_multiply_tile)(x, stride, tiles, sums);
}

// LoRA: pages of 8 rank columns.

#define LORA_AHEAD 4096  // bytes

// Prefetches what follows, as much as is read at once: 1 KiB.
static inline void lora_prefetch(const uint16_t *at) {
    for (int line = 0; line < 16; line++) __builtin_prefetch((const char *)at + LORA_AHEAD + line * 64, 0, 3);
}

static inline void shrink_begin(int64_t rows) {
    TileConfig config = {0};
    shape_tiles(&config, 0, 2, rows, 32);
    shape_tiles(&config, 2, 4, rows, 64);
    shape_tiles(&config, 4, 6, TILE_ROWS, 32);
    load_shapes(&config);
}

// x [rows, in], rows `stride` apart, times a [in / 2, 8, 2]: the sums of even and of odd tiles, [rows][8] each.
static inline void shrink_multiply(int64_t rows, int64_t in, const uint16_t *x, int64_t stride, const uint16_t *a, float *even,
                                   float *odd) {
    (void)rows;
    stores_end(x);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < in; k += 64) {
        lora_prefetch(a + k * 8);
        _tile_loadd(2, x + k, stride * 2);
        _tile_loadd(4, a + k * 8, 32);
        _tile_dpbf16ps(0, 2, 4);
        if (k + 32 == in) break;
        _tile_loadd(3, x + k + 32, stride * 2);
        _tile_loadd(5, a + (k + 32) * 8, 32);
        _tile_dpbf16ps(1, 3, 5);
    }
    _tile_stored(0, even, 32);
    _tile_stored(1, odd, 32);
}

static inline void expand_begin(int64_t rows) {
    TileConfig config = {0};
    shape_tiles(&config, 0, 4, rows, 64);
    shape_tiles(&config, 4, 5, rows, 16);
    shape_tiles(&config, 5, 8, 4, 64);
    load_shapes(&config);
}

static inline void expand_zero(float *delta) {
    (void)delta;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Adds h [rows, 8] times b [outputs / 16, 4, 16, 2] to the tiles; 16 to 64 outputs.
static inline void expand_add(int64_t rows, const uint16_t *h, const uint16_t *b, int64_t outputs, float *delta) {
    (void)rows, (void)delta;
    stores_end(h);
    lora_prefetch(b);
    _tile_loadd(4, h, 16);
    _tile_loadd(5, b, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (outputs > 16) {
        _tile_loadd(6, b + 128, 64);
        _tile_dpbf16ps(1, 4, 6);
    }
    if (outputs > 32) {
        _tile_loadd(7, b + 256, 64);
        _tile_dpbf16ps(2, 4, 7);
    }
    if (outputs > 48) {
        _tile_loadd(5, b + 384, 64);
        _tile_dpbf16ps(3, 4, 5);
    }
}

static inline void expand_store(float *delta) {  // [rows][64]
    _tile_stored(0, delta, 256);
    _tile_stored(1, delta + 16, 256);
    _tile_stored(2, delta + 32, 256);
    _tile_stored(3, delta + 48, 256);
}

// Attention: queries in 4 or 16 columns.

typedef const uint32_t *Queries;

// queries [width / 2, columns]: pairs.
static inline Queries score_begin(int64_t columns, int64_t width, const uint32_t *queries, ivec *room) {
    (void)width, (void)room;
    TileConfig config = {0};
    shape_tiles(&config, 0, 2, TILE_ROWS, columns * 4);
    shape_tiles(&config, 2, 4, TILE_ROWS, 64);
    shape_tiles(&config, 4, 5, TILE_ROWS, columns * 4);
    load_shapes(&config);
    return queries;
}

// Scores of 16 keys, and of 16 more unless `more` is NULL: [keys][columns].
static inline void score_multiply(int64_t columns, int64_t width, Queries queries, const uint16_t *keys,
                                  const uint16_t *more, float *scores) {
    const uint16_t *second = more ? more : keys;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t d = 0; d < width; d += 32) {
        _tile_loadd(4, queries + d / 2 * columns, columns * 4);
        _tile_loadd(2, keys + d, width * 2);
        _tile_dpbf16ps(0, 2, 4);
        _tile_loadd(3, second + d, width * 2);
        _tile_dpbf16ps(1, 3, 4);
    }
    _tile_stored(0, scores, columns * 4);
    if (more) _tile_stored(1, scores + 16 * columns, columns * 4);
}

static inline void mix_begin(int64_t columns) {
    uint32_t ones[256] __attribute__((aligned(64)));
    for (int i = 0; i < 256; i++) ones[i] = 0x3f803f80;
    TileConfig config = {0};
    shape_tiles(&config, 0, 4, columns, 64);
    shape_tiles(&config, 4, 7, TILE_ROWS, 64);
    load_shapes(&config);
    _tile_loadd(6, ones, 64);
}

static inline void mix_zero(float *result, float *sum) {
    (void)result, (void)sum;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
}

// Adds weights [columns, 32 keys] times two tiles of pairs of values [16, 16] each, and times ones, which are dropped where
// sum is NULL.
static inline void mix_add(int64_t columns, const uint32_t *weights, const uint32_t *pairs, float *result, float *sum) {
    (void)columns, (void)result, (void)sum;
    stores_end(weights);
    _tile_loadd(3, weights, 64);
    _tile_loadd(4, pairs, 64);
    _tile_dpbf16ps(0, 3, 4);
    _tile_loadd(5, pairs + 256, 64);
    _tile_dpbf16ps(1, 3, 5);
    _tile_dpbf16ps(2, 3, 6);
}

static inline void mix_store(float *result, float *sum) {  // [2][columns][16], [columns][16]
    _tile_stored(0, result, 64);
    _tile_stored(1, result + 256, 64);
    if (sum) _tile_stored(2, sum, 64);
}

// Output layer: 64 tokens at once, for 16 rows. Scores come out by tokens and are turned around.

#define HEAD_TOKENS 64
#define HEAD_ROWS 16

// x [rows, in] of up to 16 rows, `stride` apart, as tiles of pairs: [in / 2, 16, 2].
static inline void head_pack(int64_t rows, int64_t in, const uint16_t *x, int64_t stride, uint32_t *packed) {
    for (int64_t k = 0; k < in; k += 32) {
        ivec words[16];
        for (int64_t i = 0; i < 16; i++) words[i] = i < rows ? iload(x + i * stride + k) : izero();
        transpose(words);
        for (int64_t i = 0; i < 16; i++) istore(packed + (k / 2 + i) * 16, words[i]);
    }
}

static inline void head_begin(void) {
    TileConfig config = {0};
    shape_tiles(&config, 0, 8, TILE_ROWS, 64);
    load_shapes(&config);
}

static inline void turn(const float *scores, int64_t rows, int64_t stride, float *logits) {
    ivec words[16];
    for (int i = 0; i < 16; i++) words[i] = iload(scores + i * 16);
    transpose(words);
    for (int64_t row = 0; row < rows; row++) istore(logits + row * stride, words[row]);
}

// Adds 32 inputs' products to the tiles.
static inline void head_add(const uint16_t *w, int64_t stride, const uint32_t *packed) {
    _tile_loadd(4, packed, 64);
    _tile_loadd(5, w, stride * 2);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, w + 16 * stride, stride * 2);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(7, w + 32 * stride, stride * 2);
    _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(5, w + 48 * stride, stride * 2);
    _tile_dpbf16ps(3, 5, 4);
}

// Logits of 64 tokens, whose weights are w [64, in], for up to 16 rows.
static inline void head_multiply(int64_t rows, int64_t in, const uint16_t *w, const uint32_t *packed, float *logits,
                                 int64_t stride) {
    float scores[4 * 256] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    int64_t k = 0;
    for (; k + 32 <= in; k += 32) head_add(w + k, in, packed + k * 8);
    if (k < in) {
        uint16_t last[HEAD_TOKENS * TILE_INPUTS];
        copy_last(w, in, HEAD_TOKENS, last);
        stores_end(last);
        head_add(last, TILE_INPUTS, packed + k * 8);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + 256, 64);
    _tile_stored(2, scores + 512, 64);
    _tile_stored(3, scores + 768, 64);
    for (int64_t i = 0; i < 4; i++) turn(scores + i * 256, rows, stride, logits + i * 16);
}
