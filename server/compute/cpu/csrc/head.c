// The output layer: logits of the sampled rows, float32. Its weights are read where they lie, [vocabulary, in] bf16 (they may
// be the embedding's), once for every HEAD_ROWS rows.

#include "kernels.h"
#include "tiles.h"

#include <stdint.h>

void head_share(int64_t rows, int64_t vocabulary, int64_t in, int64_t stride, const uint16_t *x, const uint16_t *weight,
                uint32_t *packed, float *logits) {
    const int64_t room = whole(in, TILE_INPUTS);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row += HEAD_ROWS) {
        head_pack(rows - row < HEAD_ROWS ? rows - row : HEAD_ROWS, in, x + row * stride, stride, packed + row * room);
    }
    head_begin();
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < (vocabulary + HEAD_TOKENS - 1) / HEAD_TOKENS; block++) {
        // The last tokens may have been done in part already, with the same result.
        const int64_t end = (block + 1) * HEAD_TOKENS < vocabulary ? (block + 1) * HEAD_TOKENS : vocabulary;
        const int64_t first = end - HEAD_TOKENS;
        for (int64_t row = 0; row < rows; row += HEAD_ROWS) {
            head_multiply(rows - row < HEAD_ROWS ? rows - row : HEAD_ROWS, in, weight + first * in, packed + row * room,
                          logits + row * vocabulary + first, vocabulary);
        }
    }
    tiles_end();
}
