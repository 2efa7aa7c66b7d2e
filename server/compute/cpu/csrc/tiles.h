// The innermost products, one header for each kind of arithmetic: AMX's tiles, or vectors.
//
// All give the same bits. A tile takes 32 inputs: the products of even inputs are summed from 0 in their order, those of
// odd inputs by themselves, and their sum is added to what was there (TDPBF16PS does it like this; products of two bf16
// are exact in float32). A value's bits depend on its own row and column alone.

#pragma once

#include "vec.h"

#define TILE_ROWS 16
#define TILE_INPUTS 32

#if defined(EMULATED_AMX)
#include "emulated_amx.h"
#include "tiles_amx.h"
#elif defined(__AMX_BF16__)
#include "tiles_amx.h"
#else
#include "tiles_vector.h"
#endif
