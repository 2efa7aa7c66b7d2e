// The innermost products, one header for each kind of arithmetic: AMX's tiles, or vectors.
//
// All give the same bits. A tile takes 32 inputs: the products of even inputs are summed from 0 in their order, those of
// odd inputs by themselves, and their sum is added to what was there (TDPBF16PS does it like this; products of two bf16
// are exact in float32). A value's bits depend on its own row and column alone.

#pragma once

#include "kernels.h"
#include "vec.h"

// The inputs of `rows` rows of w [rows, in] that do not fill a tile, filled up with zeros: [rows, TILE_INPUTS].
static inline void copy_last(const uint16_t *w, int64_t in, int64_t rows, uint16_t *to) {
    const int64_t count = in % TILE_INPUTS;
    memset(to, 0, rows * TILE_INPUTS * 2);
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * TILE_INPUTS, w + (i + 1) * in - count, count * 2);
}

#if defined(EMULATED_AMX)
#include "emulated_amx.h"
#include "tiles_amx.h"
#elif defined(__AMX_BF16__)
#include "tiles_amx.h"
#else
#include "tiles_vector.h"
#endif
