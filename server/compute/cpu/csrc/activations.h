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
