// Functions of single numbers that models apply between their products.

#pragma once

#include "vec.h"

// 1 / (1 + exp(-x)): of x < 0 as e / (1 + e), e = exp(x), which cannot overflow.
static inline vec sigmoid(vec x) {
    const vec one = vset1(1.0f), e = exp_negative(vsub(vzero(), vabs(x)));
    return vdiv(vselect(vless(x, vzero()), e, one), vadd(one, e));
}

static inline vec silu(vec x) { return vmul(x, sigmoid(x)); }

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), written with (1 + tanh(u)) / 2 = sigmoid(2 u).
static inline vec gelu_tanh(vec x) {
    const vec cube = vmul(vmul(x, x), x);
    return vmul(x, sigmoid(vmul(vset1(1.59576912f), vfma(vset1(0.044715f), cube, x))));
}

// x (1 + erf(x / sqrt 2)) / 2. erfc of what is positive as a polynomial times exp(-x^2) (Abramowitz and Stegun 7.1.26, within
// 1.5e-7), from which small values of negative x come without cancellation.
static inline vec gelu(vec x) {
    const vec one = vset1(1.0f), half = vset1(0.5f), a = vmul(vabs(x), vset1(0.70710678f));
    const vec t = vdiv(one, vfma(vset1(0.3275911f), a, one));
    vec p = vset1(1.061405429f);
    p = vfma(p, t, vset1(-1.453152027f));
    p = vfma(p, t, vset1(1.421413741f));
    p = vfma(p, t, vset1(-0.284496736f));
    p = vfma(p, t, vset1(0.254829592f));
    const vec tail = vmul(half, vmul(vmul(p, t), exp_negative(vsub(vzero(), vmul(a, a)))));
    return vmul(x, vselect(vless(x, vzero()), tail, vsub(one, tail)));
}

static inline vec relu_squared(vec x) {
    const vec positive = vmax(vzero(), x);  // in this order a NaN stays one
    return vmul(positive, positive);
}

// limit tanh(x / limit)
static inline vec soft_cap(vec x, vec limit) {
    const vec one = vset1(1.0f), e = exp_negative(vmul(vset1(-2.0f), vabs(vdiv(x, limit))));
    const vec tanh = vdiv(vsub(one, e), vadd(one, e));
    return vmul(limit, vselect(vless(x, vzero()), vsub(vzero(), tanh), tanh));
}
