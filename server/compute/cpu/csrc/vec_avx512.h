// Vectors of 16 lanes on AVX-512.

#pragma once

#include <immintrin.h>
#include <stdint.h>

typedef __m512 vec;
typedef __m512i ivec;
typedef __mmask16 mask;

static inline vec vzero(void) { return _mm512_setzero_ps(); }
static inline vec vset1(float x) { return _mm512_set1_ps(x); }
static inline vec vload(const float *p) { return _mm512_loadu_ps(p); }
static inline void vstore(float *p, vec x) { _mm512_storeu_ps(p, x); }
static inline vec vadd(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec vsub(vec a, vec b) { return _mm512_sub_ps(a, b); }
static inline vec vmul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec vdiv(vec a, vec b) { return _mm512_div_ps(a, b); }
static inline vec vfma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec vabs(vec x) { return _mm512_abs_ps(x); }
static inline vec vround(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
static inline vec vscale2(vec x, vec n) { return _mm512_scalef_ps(x, n); }
static inline vec as_float(ivec x) { return _mm512_castsi512_ps(x); }
static inline ivec as_int(vec x) { return _mm512_castps_si512(x); }

static inline float vreduce_add(vec x) { return _mm512_reduce_add_ps(x); }
static inline float vreduce_max(vec x) { return _mm512_reduce_max_ps(x); }
static inline float vfirst(vec x) { return _mm512_cvtss_f32(x); }

static inline ivec izero(void) { return _mm512_setzero_si512(); }
static inline ivec iset1(int32_t x) { return _mm512_set1_epi32(x); }
static inline ivec iload(const void *p) { return _mm512_loadu_si512(p); }
static inline void istore(void *p, ivec x) { _mm512_storeu_si512(p, x); }
static inline ivec iadd(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
static inline ivec isub(ivec a, ivec b) { return _mm512_sub_epi32(a, b); }
static inline ivec ior(ivec a, ivec b) { return _mm512_or_si512(a, b); }
static inline ivec iand(ivec a, ivec b) { return _mm512_and_si512(a, b); }
#define ishl(x, bits) _mm512_slli_epi32(x, bits)
#define ishr(x, bits) _mm512_srli_epi32(x, bits)

static inline mask vless(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline mask vgreater_equal(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline mask vdiffers(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }  // a NaN differs
static inline mask igreater(ivec a, ivec b) { return _mm512_cmpgt_epi32_mask(a, b); }
static inline mask mand(mask a, mask b) { return a & b; }
static inline uint32_t mbits(mask m) { return m; }
static inline vec vselect(mask m, vec yes, vec no) { return _mm512_mask_mov_ps(no, m, yes); }

// 16 words of 16 bits, each in its lane.
static inline ivec iwiden(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }

// The first `count` of 16 floats; `fill` in the other lanes, whose memory is not read.
static inline vec vload_part(const float *p, int64_t count, float fill) {
    const mask there = count >= 16 ? 0xffff : count > 0 ? (mask)((1 << count) - 1) : 0;
    return _mm512_mask_loadu_ps(vset1(fill), there, p);
}

// bf16 of x in the low half of each lane: to nearest even, quiet NaN, denormals are zeros (as VCVTNEPS2BF16 does it).
static inline ivec bf16_bits(vec x) {
#ifdef __AVX512BF16__
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
#else
    const ivec bits = as_int(x), sign = iand(bits, iset1((int32_t)0x80000000)), magnitude = _mm512_xor_si512(bits, sign);
    const ivec odd = iand(ishr(bits, 16), iset1(1));
    ivec rounded = ishr(iadd(iadd(bits, iset1(0x7fff)), odd), 16);
    const mask denormal = ~igreater(magnitude, iset1(0x7fffff)), nan = igreater(magnitude, iset1(0x7f800000));
    rounded = _mm512_mask_mov_epi32(rounded, denormal, ishr(sign, 16));
    return _mm512_mask_mov_epi32(rounded, nan, ior(ishr(bits, 16), iset1(0x40)));
#endif
}

static inline void vstore_bf16(uint16_t *p, vec x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(bf16_bits(x)));
}

// 8 lanes from each of two places.
static inline ivec iload_two(const void *low, const void *high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low)),
                              _mm256_loadu_si256((const __m256i *)high), 1);
}

static inline ivec iset_two(uint32_t low, uint32_t high) {
    return _mm512_mask_set1_epi32(_mm512_set1_epi32((int32_t)low), 0xff00, (int32_t)high);
}

static inline void vstore_two(float *low, float *high, vec x) {
    _mm256_storeu_ps(low, _mm512_castps512_ps256(x));
    _mm256_storeu_ps(high, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}

// 4 lanes from each of four places, `stride` bytes apart.
static inline ivec iload_four(const void *p, int64_t stride) {
    const char *at = (const char *)p;
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)at));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(at + stride)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(at + 2 * stride)), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(at + 3 * stride)), 3);
}

// The same 4 lanes four times.
static inline ivec irepeat(const void *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }

// Lane i of every 4, in all 4.
#define ispread(x, i) _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)((i) * 0x55))

// Of every 8 words of 16 bits the first (last) 4 of a and b by turns.
static inline ivec unpack_low16(ivec a, ivec b) { return _mm512_unpacklo_epi16(a, b); }
static inline ivec unpack_high16(ivec a, ivec b) { return _mm512_unpackhi_epi16(a, b); }

// Four lanes of a and b by turns: the first 16 of 32, and the others.
static inline void interleave_fours(vec a, vec b, vec *low, vec *high) {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    *low = _mm512_permutex2var_ps(a, first, b);
    *high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
}

// The largest of the lanes that have the same place in their 4, in each of them.
static inline vec vmax_of_fours(vec x) {
    x = vmax(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    return vmax(x, _mm512_shuffle_f32x4(x, x, 0xb1));
}

// Of 8 vectors of 4 keys by 4 columns: each column's 32 keys as bf16, 16 words.
static inline void store_columns(uint32_t *to, const vec *keys) {
#ifdef __AVX512BF16__
    uint16_t order[32];  // from [8 keys, 4 columns] to [4 columns, 8 keys]
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i % 8 * 4 + i / 8);
    const __m512i by_column = _mm512_loadu_si512(order);
    __m512i p[4];
    for (int i = 0; i < 4; i++) {
        p[i] = _mm512_permutexvar_epi16(by_column, (__m512i)_mm512_cvtne2ps_pbh(keys[2 * i + 1], keys[2 * i]));
    }
#else
    __m512i p[4];
    const __m512i by_column = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (int i = 0; i < 4; i++) {  // 4 keys of a column are 4 lanes, then 4 words of 16 bits
        const __m512i low = _mm512_permutexvar_epi32(by_column, bf16_bits(keys[2 * i]));
        const __m512i high = _mm512_permutexvar_epi32(by_column, bf16_bits(keys[2 * i + 1]));
        p[i] = _mm512_packus_epi32(low, high);
    }
#endif
    const __m512i a = _mm512_shuffle_i32x4(p[0], p[1], 0x44), b = _mm512_shuffle_i32x4(p[2], p[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(p[0], p[1], 0xee), d = _mm512_shuffle_i32x4(p[2], p[3], 0xee);
    istore(to, _mm512_shuffle_i32x4(a, b, 0x88));
    istore(to + 16, _mm512_shuffle_i32x4(a, b, 0xdd));
    istore(to + 32, _mm512_shuffle_i32x4(c, d, 0x88));
    istore(to + 48, _mm512_shuffle_i32x4(c, d, 0xdd));
}

// 64 bytes past the caches; `to` is aligned to them.
static inline void stream_line(void *to, ivec x) { _mm512_stream_si512(to, x); }
static inline void stream_fence(void) { _mm_sfence(); }

// 16 x 16 lanes, in place.
static inline void transpose(ivec *m) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        m[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        m[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        m[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        m[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        m[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        m[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        m[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        m[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
