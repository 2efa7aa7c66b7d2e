// Vectors of 16 lanes as two of 8: on AVX2 with FMA, or in the compiler's own vectors on any processor.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE__
#include <immintrin.h>
#endif

typedef float half __attribute__((vector_size(32)));
typedef int32_t ihalf __attribute__((vector_size(32)));
typedef uint32_t uhalf __attribute__((vector_size(32)));
typedef uint16_t half16 __attribute__((vector_size(16)));
typedef struct { half low, high; } vec;
typedef struct { ihalf low, high; } ivec;
typedef ivec mask;  // -1 or 0 in each lane

#define INLINE static inline __attribute__((always_inline))

// Lanes of a and b by number; gcc has one spelling (before 12), clang the other.
#ifdef __clang__
#define SHUFFLE(order, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(order, a, b, ...) __builtin_shuffle(a, b, (order){__VA_ARGS__})
#endif

INLINE half hset1(float x) { return (half){x, x, x, x, x, x, x, x}; }
INLINE ihalf ihset1(int32_t x) { return (ihalf){x, x, x, x, x, x, x, x}; }
INLINE half hload(const void *p) { half x; memcpy(&x, p, 32); return x; }
INLINE ihalf ihload(const void *p) { ihalf x; memcpy(&x, p, 32); return x; }
INLINE half hselect(ihalf m, half yes, half no) { return (half)((m & (ihalf)yes) | (~m & (ihalf)no)); }

#ifdef __AVX2__
INLINE half hfma(half a, half b, half c) { return (half)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE half hround(half x) { return (half)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE half hmax(half a, half b) { return (half)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE ihalf ihwiden(const uint16_t *p) { return (ihalf)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
#else
INLINE half hfma(half a, half b, half c) {
    for (int i = 0; i < 8; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
INLINE half hround(half x) {
    for (int i = 0; i < 8; i++) x[i] = rintf(x[i]);
    return x;
}
INLINE half hmax(half a, half b) { return hselect(a > b, a, b); }  // b where one is NaN, as on x86
INLINE ihalf ihwiden(const uint16_t *p) {
    half16 x;
    memcpy(&x, p, 16);
    return __builtin_convertvector(x, ihalf);
}
#endif

INLINE vec vset1(float x) { return (vec){hset1(x), hset1(x)}; }
INLINE vec vzero(void) { return vset1(0); }
INLINE vec vload(const float *p) { return (vec){hload(p), hload(p + 8)}; }
INLINE void vstore(float *p, vec x) { memcpy(p, &x.low, 32); memcpy(p + 8, &x.high, 32); }
INLINE vec vadd(vec a, vec b) { return (vec){a.low + b.low, a.high + b.high}; }
INLINE vec vsub(vec a, vec b) { return (vec){a.low - b.low, a.high - b.high}; }
INLINE vec vmul(vec a, vec b) { return (vec){a.low * b.low, a.high * b.high}; }
INLINE vec vdiv(vec a, vec b) { return (vec){a.low / b.low, a.high / b.high}; }
INLINE vec vfma(vec a, vec b, vec c) { return (vec){hfma(a.low, b.low, c.low), hfma(a.high, b.high, c.high)}; }
INLINE vec vmax(vec a, vec b) { return (vec){hmax(a.low, b.low), hmax(a.high, b.high)}; }
INLINE vec vround(vec x) { return (vec){hround(x.low), hround(x.high)}; }
INLINE vec as_float(ivec x) { return (vec){(half)x.low, (half)x.high}; }
INLINE ivec as_int(vec x) { return (ivec){(ihalf)x.low, (ihalf)x.high}; }

INLINE ivec iset1(int32_t x) { return (ivec){ihset1(x), ihset1(x)}; }
INLINE ivec izero(void) { return iset1(0); }
INLINE ivec iload(const void *p) { return (ivec){ihload(p), ihload((const char *)p + 32)}; }
INLINE void istore(void *p, ivec x) { memcpy(p, &x.low, 32); memcpy((char *)p + 32, &x.high, 32); }
INLINE ivec iadd(ivec a, ivec b) { return (ivec){a.low + b.low, a.high + b.high}; }
INLINE ivec isub(ivec a, ivec b) { return (ivec){a.low - b.low, a.high - b.high}; }
INLINE ivec ior(ivec a, ivec b) { return (ivec){a.low | b.low, a.high | b.high}; }
INLINE ivec iand(ivec a, ivec b) { return (ivec){a.low & b.low, a.high & b.high}; }
INLINE ivec ishl(ivec x, int bits) { return (ivec){x.low << bits, x.high << bits}; }
INLINE ivec ishr(ivec x, int bits) { return (ivec){(ihalf)((uhalf)x.low >> bits), (ihalf)((uhalf)x.high >> bits)}; }
INLINE vec vabs(vec x) { return as_float(iand(as_int(x), iset1(0x7fffffff))); }

INLINE mask vless(vec a, vec b) { return (mask){a.low < b.low, a.high < b.high}; }
INLINE mask vgreater_equal(vec a, vec b) { return (mask){a.low >= b.low, a.high >= b.high}; }
INLINE mask vdiffers(vec a, vec b) { return (mask){a.low != b.low, a.high != b.high}; }  // a NaN differs
INLINE mask igreater(ivec a, ivec b) { return (mask){a.low > b.low, a.high > b.high}; }
INLINE mask mand(mask a, mask b) { return iand(a, b); }
INLINE vec vselect(mask m, vec yes, vec no) { return (vec){hselect(m.low, yes.low, no.low), hselect(m.high, yes.high, no.high)}; }

INLINE uint32_t mbits(mask m) {
#ifdef __AVX2__
    return (uint32_t)_mm256_movemask_ps((__m256)m.low) | (uint32_t)_mm256_movemask_ps((__m256)m.high) << 8;
#else
    uint32_t bits = 0;
    for (int i = 0; i < 8; i++) bits |= (m.low[i] & 1u) << i | (m.high[i] & 1u) << (i + 8);
    return bits;
#endif
}

#if !defined(__AVX2__) && !defined(__aarch64__)
#define NO_FMA
typedef float quarter __attribute__((vector_size(16)));
typedef double wide __attribute__((vector_size(32)));

INLINE half hfma_bf16(half a, half b, half c) {
    quarter x[2], y[2], z[2];
    memcpy(x, &a, 32);
    memcpy(y, &b, 32);
    memcpy(z, &c, 32);
    for (int i = 0; i < 2; i++) {
        const wide product = __builtin_convertvector(x[i], wide) * __builtin_convertvector(y[i], wide);
        z[i] = __builtin_convertvector(product + __builtin_convertvector(z[i], wide), quarter);
    }
    memcpy(&c, z, 32);
    return c;
}

// Without such an instruction fmaf() is a call for every lane. The product of two bf16 is exact in double, and so is the
// sum, unless one of the two is so much smaller that it does not change what the sum is as float32: the same bits.
INLINE vec vfma_bf16(vec a, vec b, vec c) { return (vec){hfma_bf16(a.low, b.low, c.low), hfma_bf16(a.high, b.high, c.high)}; }
#endif

// Sums in the order of AVX-512's: halves, quarters, eighths.
INLINE float vreduce_add(vec x) {
    const half t = x.low + x.high;
    const float a = t[0] + t[4], b = t[1] + t[5], c = t[2] + t[6], d = t[3] + t[7];
    return (a + c) + (b + d);
}

INLINE float vreduce_max(vec x) {
    const half t = hmax(x.low, x.high);
    float most = t[0];
    for (int i = 1; i < 8; i++) most = t[i] > most ? t[i] : most;
    return most;
}

INLINE float vfirst(vec x) { return x.low[0]; }

INLINE half hscale2(half x, half n) {
    const ihalf power = __builtin_convertvector(n, ihalf), near = power >> 1;
    return x * (half)((near + 127) << 23) * (half)((power - near + 127) << 23);
}

// x 2^n, n whole and at least -200: in two steps, so that a result below the normal numbers is rounded once.
INLINE vec vscale2(vec x, vec n) { return (vec){hscale2(x.low, n.low), hscale2(x.high, n.high)}; }

INLINE ivec iwiden(const uint16_t *p) { return (ivec){ihwiden(p), ihwiden(p + 8)}; }

INLINE vec vload_part(const float *p, int64_t count, float fill) {
    if (count >= 16) return vload(p);
    float x[16];
    for (int64_t i = 0; i < 16; i++) x[i] = i < count ? p[i] : fill;
    return vload(x);
}

INLINE ihalf bf16_half(ihalf bits) {
    const ihalf sign = bits & ihset1((int32_t)0x80000000), magnitude = bits ^ sign;
    const uhalf rounded = (uhalf)(bits + ihset1(0x7fff) + (ihalf)((uhalf)bits >> 16 & 1)) >> 16;
    const ihalf denormal = magnitude <= ihset1(0x7fffff), nan = magnitude > ihset1(0x7f800000);
    const ihalf quiet = (ihalf)((uhalf)bits >> 16) | 0x40;
    const ihalf normal = (denormal & (ihalf)((uhalf)sign >> 16)) | (~denormal & (ihalf)rounded);
    return (nan & quiet) | (~nan & normal);
}

// bf16 of x in the low half of each lane: to nearest even, quiet NaN, denormals are zeros (as VCVTNEPS2BF16 does it).
INLINE ivec bf16_bits(vec x) { return (ivec){bf16_half((ihalf)x.low), bf16_half((ihalf)x.high)}; }

INLINE void vstore_bf16(uint16_t *p, vec x) {
    const ivec bits = bf16_bits(x);
#ifdef __AVX2__
    const __m256i packed = _mm256_packus_epi32((__m256i)bits.low, (__m256i)bits.high);
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
#else
    const half16 low = __builtin_convertvector(bits.low, half16), high = __builtin_convertvector(bits.high, half16);
    memcpy(p, &low, 16);
    memcpy(p + 8, &high, 16);
#endif
}

// 8 lanes from each of two places.
INLINE ivec iload_two(const void *low, const void *high) { return (ivec){ihload(low), ihload(high)}; }
INLINE ivec iset_two(uint32_t low, uint32_t high) { return (ivec){ihset1((int32_t)low), ihset1((int32_t)high)}; }
INLINE void vstore_two(float *low, float *high, vec x) { memcpy(low, &x.low, 32); memcpy(high, &x.high, 32); }

// 4 lanes from each of four places, `stride` bytes apart.
INLINE ivec iload_four(const void *p, int64_t stride) {
    const char *at = (const char *)p;
    ivec x;
    memcpy(&x.low, at, 16);
    memcpy((char *)&x.low + 16, at + stride, 16);
    memcpy(&x.high, at + 2 * stride, 16);
    memcpy((char *)&x.high + 16, at + 3 * stride, 16);
    return x;
}

// The same 4 lanes four times.
INLINE ivec irepeat(const void *p) { return iload_four(p, 0); }

// Lane i of every 4, in all 4.
#define SPREAD(x, i) SHUFFLE(ihalf, x, x, i, i, i, i, (i) + 4, (i) + 4, (i) + 4, (i) + 4)
#define ispread(x, i) ((ivec){SPREAD((x).low, i), SPREAD((x).high, i)})

typedef uint16_t words16 __attribute__((vector_size(32)));

#define unpack_half(a, b, f)                                                                                            \
    ((ihalf)SHUFFLE(words16, (words16)(a), (words16)(b), f, f + 16, f + 1, f + 17, f + 2, f + 18, f + 3, f + 19, f + 8, \
                    f + 24, f + 9, f + 25, f + 10, f + 26, f + 11, f + 27))

// Of every 8 words of 16 bits the first (last) 4 of a and b by turns.
INLINE ivec unpack_low16(ivec a, ivec b) { return (ivec){unpack_half(a.low, b.low, 0), unpack_half(a.high, b.high, 0)}; }
INLINE ivec unpack_high16(ivec a, ivec b) { return (ivec){unpack_half(a.low, b.low, 4), unpack_half(a.high, b.high, 4)}; }

#define fours_half(a, b, f) SHUFFLE(ihalf, a, b, f, f + 1, f + 2, f + 3, f + 8, f + 9, f + 10, f + 11)

// Four lanes of a and b by turns: the first 16 of 32, and the others.
INLINE void interleave_fours(vec a, vec b, vec *low, vec *high) {
    *low = (vec){fours_half(a.low, b.low, 0), fours_half(a.low, b.low, 4)};
    *high = (vec){fours_half(a.high, b.high, 0), fours_half(a.high, b.high, 4)};
}

// The largest of the lanes that have the same place in their 4, in each of them.
INLINE vec vmax_of_fours(vec x) {
    const half t = hmax(x.low, x.high), turned = SHUFFLE(ihalf, t, t, 4, 5, 6, 7, 0, 1, 2, 3);
    return (vec){hmax(t, turned), hmax(t, turned)};
}

// Of 8 vectors of 4 keys by 4 columns: each column's 32 keys as bf16, 16 words.
INLINE void store_columns(uint32_t *to, const vec *keys) {
    uint16_t *at = (uint16_t *)to;
    for (int i = 0; i < 8; i++) {
        int32_t bits[16];
        istore(bits, bf16_bits(keys[i]));
        for (int j = 0; j < 16; j++) at[j % 4 * 32 + i * 4 + j / 4] = (uint16_t)bits[j];
    }
}

// 64 bytes past the caches; `to` is aligned to them.
INLINE void stream_line(void *to, ivec x) {
#ifdef __AVX2__
    _mm256_stream_si256((__m256i *)to, (__m256i)x.low);
    _mm256_stream_si256((__m256i *)to + 1, (__m256i)x.high);
#else
    istore(to, x);
#endif
}

INLINE void stream_fence(void) {
#ifdef __AVX2__
    _mm_sfence();
#endif
}

#ifdef __AVX2__
// 8 x 8 lanes of `from`, to `to`.
INLINE void transpose_half(const ihalf *from, ihalf *to) {
    __m256i t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32((__m256i)from[i], (__m256i)from[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32((__m256i)from[i], (__m256i)from[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        to[i] = (ihalf)_mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
        to[i + 4] = (ihalf)_mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
    }
}

// 16 x 16 lanes, in place.
INLINE void transpose(ivec *m) {
    ihalf from[4][8], to[4][8];
    for (int i = 0; i < 8; i++) {
        from[0][i] = m[i].low;
        from[1][i] = m[i + 8].low;
        from[2][i] = m[i].high;
        from[3][i] = m[i + 8].high;
    }
    for (int i = 0; i < 4; i++) transpose_half(from[i], to[i]);
    for (int i = 0; i < 8; i++) {
        m[i] = (ivec){to[0][i], to[1][i]};
        m[i + 8] = (ivec){to[2][i], to[3][i]};
    }
}
#else
INLINE void transpose(ivec *m) {
    int32_t from[16][16], to[16];
    for (int i = 0; i < 16; i++) istore(from[i], m[i]);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) to[j] = from[j][i];
        m[i] = iload(to);
    }
}
#endif
