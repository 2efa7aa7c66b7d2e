// Vectors of 16 lanes of 32 bits: what all kernels here are written in. One header for each width of the processor's own
// vectors; the same operations in the same order, so that a kernel gives the same bits with any of them.

#pragma once

#include <string.h>

#ifdef __AVX512F__
#include "vec_avx512.h"
#else
#include "vec_halves.h"
#endif

#ifndef NO_FMA
#define vfma_bf16 vfma  // a b + c, rounded once, of a and b that are bf16
#endif

static inline vec vload_bf16(const uint16_t *p) { return as_float(ishl(iwiden(p), 16)); }

// The first `count` of 16, and zeros. Nothing past them is read.
static inline vec vload_bf16_part(const uint16_t *p, int64_t count) {
    uint16_t room[16] = {0};
    memcpy(room, p, (size_t)count * 2);
    return vload_bf16(room);
}

// The first `count` of 16. Nothing past them is written.
static inline void vstore_bf16_part(uint16_t *p, vec x, int64_t count) {
    uint16_t room[16];
    vstore_bf16(room, x);
    memcpy(p, room, (size_t)count * 2);
}

// What is left of x once it has been stored as bf16.
static inline vec vround_bf16(vec x) { return as_float(ishl(bf16_bits(x), 16)); }

// Two bf16 in each lane, the even one in its low half.
static inline ivec bf16_pairs(vec even, vec odd) { return ior(bf16_bits(even), ishl(bf16_bits(odd), 16)); }

// exp(x) for x <= 0: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients), within 2 ulp.
static inline vec exp_negative(vec x) {
    x = vmax(vset1(-104.0f), x);  // in this order a NaN stays one
    const vec n = vround(vmul(x, vset1(1.44269504f)));
    vec r = vfma(n, vset1(-0.693359375f), x);
    r = vfma(n, vset1(2.12194440e-4f), r);
    vec p = vset1(1.9875691500e-4f);
    p = vfma(p, r, vset1(1.3981999507e-3f));
    p = vfma(p, r, vset1(8.3334519073e-3f));
    p = vfma(p, r, vset1(4.1665795894e-2f));
    p = vfma(p, r, vset1(1.6666665459e-1f));
    p = vfma(p, r, vset1(5.0000001201e-1f));
    p = vfma(vmul(p, r), r, vadd(r, vset1(1.0f)));
    return vscale2(p, n);
}

// Has this thread treat denormals as zeros in every result, as AMX and VDPBF16PS always do; returns what to restore.
static inline uint64_t flush_denormals(void) {
#if defined(__SSE__)
    const uint32_t before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#elif defined(__aarch64__)
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1 << 24));
    return before;
#else
    return 0;
#endif
}

static inline void restore_denormals(uint64_t before) {
#if defined(__SSE__)
    _mm_setcsr((uint32_t)before);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
    (void)before;
#endif
}
