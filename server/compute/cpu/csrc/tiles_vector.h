// The innermost products by vectors: dot products of bf16 pairs where the processor has them, else fused multiply-adds.
//
// Columns are lanes, and a row's inputs are broadcast. To sum even and odd inputs by themselves, both operands are reordered
// into chains: of 32 inputs first the even ones, CHAIN words of 32 bits, then the odd ones. With dot products a word is
// two inputs (the first of the chain in its high half, which VDPBF16PS multiplies first), else one as float32.

#pragma once

#include <stdint.h>
#include <string.h>

#ifndef INLINE
#define INLINE static inline __attribute__((always_inline))
#endif

#ifdef __AVX512BF16__
#define CHAIN 8  // words of 32 inputs' even (odd) ones
#define PAIRS 2  // pairs of inputs that make one word of each chain
INLINE vec chain(vec sum, ivec a, ivec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// Pairs of inputs, in all lanes, as words of the chains.
INLINE void split_pairs(const ivec *pairs, ivec *even, ivec *odd) {
    const __m512i low = _mm512_set1_epi32(0xffff);
    *even = _mm512_ternarylogic_epi32(ishl(pairs[0], 16), pairs[1], low, 0xf8);  // a | b & c
    *odd = _mm512_ternarylogic_epi32(pairs[0], ishr(pairs[1], 16), low, 0xd8);   // c ? b : a
}

// 32 inputs of one row as words: [2][CHAIN].
INLINE void split_row(const uint16_t *x, uint32_t *to) {
    const __m512i words = iload(x), within = _mm512_broadcast_i32x4(
        _mm_setr_epi8(4, 5, 0, 1, 12, 13, 8, 9, 6, 7, 2, 3, 14, 15, 10, 11));
    const __m512i by_chain = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    istore(to, _mm512_permutexvar_epi64(by_chain, _mm512_shuffle_epi8(words, within)));
}
#else
#define CHAIN 16
#define PAIRS 1
INLINE vec chain(vec sum, ivec a, ivec b) { return vfma_bf16(as_float(a), as_float(b), sum); }

INLINE void split_pairs(const ivec *pairs, ivec *even, ivec *odd) {
    *even = ishl(pairs[0], 16);
    *odd = iand(pairs[0], iset1((int32_t)0xffff0000));
}

INLINE void split_row(const uint16_t *x, uint32_t *to) {
    ivec pairs = iload(x), even, odd;
    split_pairs(&pairs, &even, &odd);
    istore(to, even);
    istore(to + CHAIN, odd);
}
#endif

#define WORDS (2 * CHAIN)  // of 32 inputs of a row

static inline void tiles_end(void) {}

// Calls block(rows, first row, ...) for 4 rows as often as they go, then for 2 and 1 of what is left: constants, so that
// the compiler keeps their sums in registers.
#define BY_ROWS(total, block, ...)                                          \
    do {                                                                    \
        int64_t row_ = 0;                                                   \
        for (; row_ + 4 <= (total); row_ += 4) block(4, row_, __VA_ARGS__); \
        if (row_ + 2 <= (total)) {                                          \
            block(2, row_, __VA_ARGS__);                                    \
            row_ += 2;                                                      \
        }                                                                   \
        if (row_ < (total)) block(1, row_, __VA_ARGS__);                    \
    } while (0)

// Pairs of 32 inputs in 16 columns, `bytes` apart, as words of the chains: [2][CHAIN].
INLINE void split_columns(const void *pairs, int64_t bytes, ivec *to) {
    for (int i = 0; i < CHAIN; i++) {
        ivec p[PAIRS];
        for (int j = 0; j < PAIRS; j++) p[j] = iload((const char *)pairs + (i * PAIRS + j) * bytes);
        split_pairs(p, to + i, to + CHAIN + i);
    }
}

#ifdef __AVX512F__
#define PASSES 1  // over the columns: there are registers for both chains of 4 rows
#else
#define PASSES 2
#endif

// Adds to sums [rows] the products of 32 inputs: of rows, whose words are `stride` apart, and columns.
INLINE void multiply_columns(const int rows, const uint32_t *words, int64_t stride, const ivec *columns, vec *sums) {
    vec both[2][4];
    for (int r = 0; r < rows; r++) both[0][r] = both[1][r] = vzero();
    for (int pass = 0; pass < PASSES; pass++) {
#pragma GCC unroll 4
        for (int i = 0; i < CHAIN; i++) {
            for (int odd = pass; odd < 2; odd += PASSES) {
                for (int r = 0; r < rows; r++) {
                    const ivec input = iset1((int32_t)words[r * stride + odd * CHAIN + i]);
                    both[odd][r] = chain(both[odd][r], input, columns[odd * CHAIN + i]);
                }
            }
        }
    }
    for (int r = 0; r < rows; r++) sums[r] = vadd(sums[r], vadd(both[0][r], both[1][r]));
}

// NF4: blocks of 64 inputs by 32 outputs.

#define NF4_ROWS 32  // rows whose sums and inputs stay in the first level of the cache

typedef uint32_t Decoded;
#define DECODED (4 * CHAIN * 32)  // of a block: [2 tiles][2 chains][CHAIN][32 outputs]

#if defined(__AVX512BF16__)
typedef ivec Nf4Table;

static inline Nf4Table nf4_table(const float *codes) {  // twice: indices have a fifth bit, which says nothing
    uint16_t table[32];
    vstore_bf16(table, vload(codes));
    memcpy(table + 16, table, 32);
    return iload(table);
}

// 32 bytes of a pair of inputs are 16 words, of outputs j and 16 + j: nibbles (j, even), (16 + j, even), (j, odd), ...
INLINE void nf4_decode(const uint8_t *packed, Nf4Table table, Decoded *to) {
    for (int tile = 0; tile < 2; tile++, to += 2 * CHAIN * 32) {
        for (int i = 0; i < CHAIN; i++, packed += 64) {
            const ivec first = ishl(iwiden((const uint16_t *)packed), 16);
            const ivec nibbles = ior(first, iwiden((const uint16_t *)(packed + 32)));
            istore(to + i * 32, _mm512_permutexvar_epi16(nibbles, table));
            istore(to + i * 32 + 16, _mm512_permutexvar_epi16(ishr(nibbles, 4), table));
            istore(to + (CHAIN + i) * 32, _mm512_permutexvar_epi16(ishr(nibbles, 8), table));
            istore(to + (CHAIN + i) * 32 + 16, _mm512_permutexvar_epi16(ishr(nibbles, 12), table));
        }
    }
}
#elif defined(__AVX512F__)
typedef vec Nf4Table;

static inline Nf4Table nf4_table(const float *codes) { return vround_bf16(vload(codes)); }

INLINE void nf4_decode(const uint8_t *packed, Nf4Table table, Decoded *to) {
    for (int tile = 0; tile < 2; tile++, to += 2 * CHAIN * 32) {
        for (int i = 0; i < CHAIN; i++, packed += 32) {
            const ivec nibbles = iwiden((const uint16_t *)packed);  // the table is looked up by 4 bits
            istore(to + i * 32, as_int(_mm512_permutexvar_ps(nibbles, table)));
            istore(to + i * 32 + 16, as_int(_mm512_permutexvar_ps(ishr(nibbles, 4), table)));
            istore(to + (CHAIN + i) * 32, as_int(_mm512_permutexvar_ps(ishr(nibbles, 8), table)));
            istore(to + (CHAIN + i) * 32 + 16, as_int(_mm512_permutexvar_ps(ishr(nibbles, 12), table)));
        }
    }
}
#elif defined(__AVX2__)
typedef struct { __m256i low, high; } Nf4Table;  // bytes of the 16 values, twice

static inline Nf4Table nf4_table(const float *codes) {
    uint16_t table[16];
    uint8_t low[32], high[32];
    vstore_bf16(table, vload(codes));
    for (int i = 0; i < 32; i++) low[i] = (uint8_t)table[i % 16], high[i] = (uint8_t)(table[i % 16] >> 8);
    return (Nf4Table){_mm256_loadu_si256((const __m256i *)low), _mm256_loadu_si256((const __m256i *)high)};
}

// 32 bytes by 4-bit indices: 16 outputs of a pair of inputs by turns.
INLINE void nf4_look_up(__m256i indices, Nf4Table table, Decoded *to) {
    const __m256i low = _mm256_shuffle_epi8(table.low, indices), high = _mm256_shuffle_epi8(table.high, indices);
    const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
    const __m256i first = _mm256_permute2x128_si256(a, b, 0x20), second = _mm256_permute2x128_si256(a, b, 0x31);
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    _mm256_storeu_si256((__m256i *)to, _mm256_slli_epi32(first, 16));
    _mm256_storeu_si256((__m256i *)(to + 8), _mm256_slli_epi32(second, 16));
    _mm256_storeu_si256((__m256i *)(to + CHAIN * 32), _mm256_and_si256(first, odd));
    _mm256_storeu_si256((__m256i *)(to + CHAIN * 32 + 8), _mm256_and_si256(second, odd));
}

INLINE void nf4_decode(const uint8_t *packed, Nf4Table table, Decoded *to) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int tile = 0; tile < 2; tile++, to += 2 * CHAIN * 32) {
        for (int i = 0; i < CHAIN; i++, packed += 32) {
            const __m256i bytes = _mm256_loadu_si256((const __m256i *)packed);
            nf4_look_up(_mm256_and_si256(bytes, nibble), table, to + i * 32);
            nf4_look_up(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), table, to + i * 32 + 16);
        }
    }
}
#else
typedef struct { float values[16]; } Nf4Table;

static inline Nf4Table nf4_table(const float *codes) {
    Nf4Table table;
    vstore(table.values, vround_bf16(vload(codes)));
    return table;
}

INLINE void nf4_decode(const uint8_t *packed, Nf4Table table, Decoded *to) {
    for (int tile = 0; tile < 2; tile++, to += 2 * CHAIN * 32) {
        for (int i = 0; i < CHAIN; i++, packed += 32) {
            for (int byte = 0; byte < 32; byte++) {
                Decoded *at = to + (byte % 2 * CHAIN + i) * 32 + byte / 2;
                memcpy(at, &table.values[packed[byte] & 15], 4);
                memcpy(at + 16, &table.values[packed[byte] >> 4], 4);
            }
        }
    }
}
#endif

static inline void nf4_begin(int64_t rows) { (void)rows; }

#ifdef __AVX512F__
#define NF4_VECTORS 2  // whose sums fit into registers for 4 rows
#else
#define NF4_VECTORS 1
#endif

INLINE void nf4_rows(const int rows, int64_t row, const uint32_t *words, const Decoded *decoded, float *sums) {
    words += row * 2 * WORDS;
    for (int column = 0; column < 2; column += NF4_VECTORS) {
        vec total[4][NF4_VECTORS];
        for (int r = 0; r < rows; r++) {
            for (int v = 0; v < NF4_VECTORS; v++) total[r][v] = vzero();
        }
        for (int tile = 0; tile < 2; tile++) {
            vec both[2][4][NF4_VECTORS];
            for (int odd = 0; odd < 2; odd++) {
                const Decoded *b = decoded + (tile * 2 + odd) * CHAIN * 32 + column * 16;
                const uint32_t *a = words + tile * WORDS + odd * CHAIN;
                for (int r = 0; r < rows; r++) {
                    for (int v = 0; v < NF4_VECTORS; v++) both[odd][r][v] = vzero();
                }
#pragma GCC unroll 2
                for (int i = 0; i < CHAIN; i++) {
                    for (int v = 0; v < NF4_VECTORS; v++) {
                        const ivec column_words = iload(b + i * 32 + v * 16);
                        for (int r = 0; r < rows; r++) {
                            both[odd][r][v] = chain(both[odd][r][v], iset1((int32_t)a[r * 2 * WORDS + i]), column_words);
                        }
                    }
                }
            }
            for (int r = 0; r < rows; r++) {
                for (int v = 0; v < NF4_VECTORS; v++) {
                    total[r][v] = vadd(total[r][v], vadd(both[0][r][v], both[1][r][v]));
                }
            }
        }
        for (int r = 0; r < rows; r++) {
            for (int v = 0; v < NF4_VECTORS; v++) vstore(sums + (row + r) * 32 + (column + v) * 16, total[r][v]);
        }
    }
}

// One block for up to 32 rows of x, `stride` values apart, into sums [rows][32].
static inline void nf4_multiply(int64_t rows, const uint16_t *x, int64_t stride, const Decoded *decoded, float *sums) {
    uint32_t words[32 * 2 * WORDS] __attribute__((aligned(64)));
    for (int64_t row = 0; row < rows; row++) {
        split_row(x + row * stride, words + row * 2 * WORDS);
        split_row(x + row * stride + TILE_INPUTS, words + row * 2 * WORDS + WORDS);
    }
    BY_ROWS(rows, nf4_rows, words, decoded, sums);
}

// LoRA: pages of 8 rank columns.

static inline void shrink_begin(int64_t rows) { (void)rows; }

// Even tiles in the lower 8 lanes, odd ones in the upper 8.
INLINE void shrink_rows(const int rows, int64_t row, int64_t in, const uint16_t *x, int64_t stride, const uint16_t *a,
                        float *even_sums, float *odd_sums) {
    static const uint16_t zeros[256] __attribute__((aligned(64))) = {0};
    vec total[4];
    for (int r = 0; r < rows; r++) total[r] = vzero();
    for (int64_t k = 0; k < in; k += 64) {
        const int two = k + 32 < in;
        const uint16_t *low = a + k * 8, *high = two ? low + 256 : zeros;
        uint32_t words[4][2][WORDS] __attribute__((aligned(64)));
        vec even[4], odd[4];
        for (int r = 0; r < rows; r++) {
            split_row(x + (row + r) * stride + k, words[r][0]);
            if (two) split_row(x + (row + r) * stride + k + 32, words[r][1]);
            else memset(words[r][1], 0, sizeof(words[r][1]));
            even[r] = odd[r] = vzero();
        }
#pragma GCC unroll 2
        for (int i = 0; i < CHAIN; i++) {
            ivec p[PAIRS], e, o;
            for (int j = 0; j < PAIRS; j++) {
                const int pair = i * PAIRS + j;
                p[j] = iload_two(low + pair * 16, high + pair * 16);
                __builtin_prefetch((const char *)low + 4096 + pair * 64, 0, 3);
            }
            split_pairs(p, &e, &o);
            for (int r = 0; r < rows; r++) {
                even[r] = chain(even[r], iset_two(words[r][0][i], words[r][1][i]), e);
                odd[r] = chain(odd[r], iset_two(words[r][0][CHAIN + i], words[r][1][CHAIN + i]), o);
            }
        }
        for (int r = 0; r < rows; r++) total[r] = vadd(total[r], vadd(even[r], odd[r]));
    }
    for (int r = 0; r < rows; r++) vstore_two(even_sums + (row + r) * 8, odd_sums + (row + r) * 8, total[r]);
}

// x [rows, in], rows `stride` apart, times a [in / 2, 8, 2]: the sums of even and of odd tiles, [rows][8] each.
static inline void shrink_multiply(int64_t rows, int64_t in, const uint16_t *x, int64_t stride, const uint16_t *a, float *even,
                                   float *odd) {
    BY_ROWS(rows, shrink_rows, in, x, stride, a, even, odd);
}

static inline void expand_begin(int64_t rows) { (void)rows; }

static inline void expand_zero(float *delta) { memset(delta, 0, TILE_ROWS * 64 * sizeof(float)); }

INLINE void expand_rows(const int rows, int64_t row, const uint32_t *words, const uint16_t *b, int64_t outputs, float *delta) {
    enum { SHORT = CHAIN / 4 };  // words of 8 inputs' even ones
    for (int64_t column = 0; column < outputs; column += 16) {
        vec even[4], odd[4];
        for (int r = 0; r < rows; r++) even[r] = odd[r] = vzero();
#pragma GCC unroll 4
        for (int i = 0; i < SHORT; i++) {
            ivec p[PAIRS], e, o;
            for (int j = 0; j < PAIRS; j++) p[j] = iload(b + column * 8 + (i * PAIRS + j) * 32);
            split_pairs(p, &e, &o);
            for (int r = 0; r < rows; r++) {
                even[r] = chain(even[r], iset1((int32_t)words[(row + r) * 2 * SHORT + i]), e);
                odd[r] = chain(odd[r], iset1((int32_t)words[(row + r) * 2 * SHORT + SHORT + i]), o);
            }
        }
        for (int r = 0; r < rows; r++) {
            float *to = delta + (row + r) * 64 + column;
            vstore(to, vadd(vload(to), vadd(even[r], odd[r])));
        }
    }
}

// Adds h [rows, 8] times b [outputs / 16, 4, 16, 2] to delta [rows][64]; 16 to 64 outputs.
static inline void expand_add(int64_t rows, const uint16_t *h, const uint16_t *b, int64_t outputs, float *delta) {
    uint32_t words[TILE_ROWS * WORDS / 4];
    for (int64_t i = 0; i < rows * 8; i += 8) {
        uint16_t inputs[32] = {0};
        uint32_t split[WORDS];
        memcpy(inputs, h + i, 16);
        split_row(inputs, split);
        memcpy(words + i * WORDS / 32, split, CHAIN);
        memcpy(words + i * WORDS / 32 + CHAIN / 4, split + CHAIN, CHAIN);
    }
    for (int line = 0; line < 16; line++) __builtin_prefetch((const char *)b + 4096 + line * 64, 0, 3);
    BY_ROWS(rows, expand_rows, words, b, outputs, delta);
}

static inline void expand_store(float *delta) { (void)delta; }

// Attention: queries in 4 or 16 columns.

#define NARROW 4  // columns

typedef const ivec *Queries;

// queries [width / 2, columns]: pairs. They are reordered into chains once: room for [width / 32][2][CHAIN].
static inline Queries score_begin(int64_t columns, int64_t width, const uint32_t *queries, ivec *room) {
    for (int64_t d = 0; d < width / 32; d++, room += WORDS) {
        if (columns != NARROW) split_columns(queries + d * 256, 64, room);
        for (int i = 0; columns == NARROW && i < CHAIN; i++) {
            ivec p[PAIRS];
            for (int j = 0; j < PAIRS; j++) p[j] = irepeat(queries + (d * 16 + i * PAIRS + j) * NARROW);
            split_pairs(p, room + i, room + CHAIN + i);
        }
    }
    return room - width / 32 * WORDS;
}

// Four keys by four columns are the lanes.
INLINE void score_narrow(int64_t width, const ivec *queries, const uint16_t *keys, float *scores) {
    for (int64_t key = 0; key < 16; key += 4, keys += 4 * width, scores += 16) {
        vec total = vzero();
        const ivec *q = queries;
        for (int64_t d = 0; d < width; d += 32, q += WORDS) {
            vec even = vzero(), odd = vzero();
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {  // 8 inputs: 4 pairs
                const ivec words = iload_four(keys + d + i * 8, width * 2);
                const ivec spread[4] = {ispread(words, 0), ispread(words, 1), ispread(words, 2), ispread(words, 3)};
                for (int j = 0; j < 4 / PAIRS; j++) {
                    const int at = i * 4 / PAIRS + j;
                    ivec e, o;
                    split_pairs(spread + j * PAIRS, &e, &o);
                    even = chain(even, e, q[at]);
                    odd = chain(odd, o, q[CHAIN + at]);
                }
            }
            total = vadd(total, vadd(even, odd));
        }
        vstore(scores, total);
    }
}

INLINE void score_queries(const int rows, int64_t row, int64_t width, const uint32_t *words, const ivec *queries, float *scores) {
    vec total[4];
    for (int r = 0; r < rows; r++) total[r] = vzero();
    for (int64_t d = 0; d < width / 32; d++) {
        multiply_columns(rows, words + (row * (width / 32) + d) * WORDS, width / 32 * WORDS, queries + d * WORDS, total);
    }
    for (int r = 0; r < rows; r++) vstore(scores + (row + r) * 16, total[r]);
}

INLINE void score_keys(int64_t columns, int64_t width, Queries queries, const uint16_t *keys, float *scores) {
    if (columns == NARROW) {
        score_narrow(width, queries, keys, scores);
        return;
    }
    uint32_t words[16 * 8 * WORDS] __attribute__((aligned(64)));
    for (int64_t i = 0; i < 16 * width / 32; i++) split_row(keys + i * 32, words + i * WORDS);
    BY_ROWS(16, score_queries, width, words, queries, scores);
}

// Scores of 16 keys, and of 16 more unless `more` is NULL: [keys][columns].
static inline void score_multiply(int64_t columns, int64_t width, Queries queries, const uint16_t *keys,
                                  const uint16_t *more, float *scores) {
    score_keys(columns, width, queries, keys, scores);
    if (more) score_keys(columns, width, queries, more, scores + 16 * columns);
}

static inline void mix_begin(int64_t columns) { (void)columns; }

static inline void mix_zero(float *result, float *sum) {
    memset(result, 0, 512 * sizeof(float));
    if (sum) memset(sum, 0, 256 * sizeof(float));
}

INLINE void mix_rows(const int rows, int64_t row, const uint32_t *words, const ivec *values, float *result) {
    vec sums[4];
    for (int r = 0; r < rows; r++) sums[r] = vload(result + (row + r) * 16);
    multiply_columns(rows, words + row * WORDS, WORDS, values, sums);
    for (int r = 0; r < rows; r++) vstore(result + (row + r) * 16, sums[r]);
}

// Adds weights [columns, 32 keys] times two tiles of pairs of values [16, 16] each, and times ones unless sum is NULL.
static inline void mix_add(int64_t columns, const uint32_t *weights, const uint32_t *pairs, float *result, float *sum) {
    uint32_t words[16 * WORDS] __attribute__((aligned(64))), ones[16] __attribute__((aligned(64)));
    ivec values[WORDS];
    for (int64_t c = 0; c < columns; c++) split_row((const uint16_t *)(weights + c * 16), words + c * WORDS);
    split_columns(pairs, 64, values);
    BY_ROWS(columns, mix_rows, words, values, result);
    split_columns(pairs + 256, 64, values);
    BY_ROWS(columns, mix_rows, words, values, result + 256);
    if (!sum) return;
    for (int i = 0; i < 16; i++) ones[i] = 0x3f803f80;
    split_columns(ones, 0, values);
    BY_ROWS(columns, mix_rows, words, values, sum);
}

static inline void mix_store(float *result, float *sum) { (void)result, (void)sum; }

// Output layer: 16 tokens at once, their weights turned around to be lanes, for as many rows as there are.

#define HEAD_TOKENS 16
#define HEAD_ROWS 64

// x [rows, in], rows `stride` apart, as words of the chains.
static inline void head_pack(int64_t rows, int64_t in, const uint16_t *x, int64_t stride, uint32_t *packed) {
    for (int64_t row = 0; row < rows; row++, x += stride) {
        for (int64_t k = 0; k < in; k += 32, packed += WORDS) split_row(x + k, packed);
    }
}

static inline void head_begin(void) {}

INLINE void head_rows(const int rows, int64_t row, int64_t stride, const uint32_t *words, const ivec *tokens, float *totals) {
    vec sums[4];
    for (int r = 0; r < rows; r++) sums[r] = vload(totals + (row + r) * 16);
    multiply_columns(rows, words + row * stride, stride, tokens, sums);
    for (int r = 0; r < rows; r++) vstore(totals + (row + r) * 16, sums[r]);
}

// Adds to totals [rows][16] the products of 32 inputs: of rows, whose words are `words_stride` apart, and 16 tokens.
INLINE void head_add(int64_t rows, const uint16_t *w, int64_t stride, const uint32_t *words, int64_t words_stride,
                     float *totals) {
    ivec pairs[16], tokens[WORDS];
    for (int64_t i = 0; i < 16; i++) {
        __builtin_prefetch(w + (16 + i) * stride, 0, 2);  // the next tokens': rows are too short for the processor's own
        pairs[i] = iload(w + i * stride);
    }
    transpose(pairs);
    split_columns(pairs, sizeof(ivec), tokens);
    BY_ROWS(rows, head_rows, words_stride, words, tokens, totals);
}

// Logits of 16 tokens, whose weights are w [16, in], for up to 64 rows.
static inline void head_multiply(int64_t rows, int64_t in, const uint16_t *w, const uint32_t *packed, float *logits,
                                 int64_t stride) {
    float totals[HEAD_ROWS * 16] __attribute__((aligned(64)));
    const int64_t words = (in + 31) / 32 * WORDS;
    int64_t k = 0;
    memset(totals, 0, rows * 64);
    for (; k + 32 <= in; k += 32) head_add(rows, w + k, in, packed + k / 32 * WORDS, words, totals);
    if (k < in) {
        uint16_t last[HEAD_TOKENS * TILE_INPUTS];
        copy_last(w, in, HEAD_TOKENS, last);
        head_add(rows, last, TILE_INPUTS, packed + k / 32 * WORDS, words, totals);
    }
    for (int64_t row = 0; row < rows; row++) vstore(logits + row * stride, vload(totals + row * 16));
}
