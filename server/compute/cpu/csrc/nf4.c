// NF4 matrix product, in the weight layout of bitsandbytes' CPU kernel.
//
// Weights: for each 32 outputs, for each pair of inputs (k, k + 1), 32 bytes. Byte i holds output i / 2 (low nibble) and
// output 16 + i / 2 (high nibble) for input k + i % 2: looked up, 16 such pairs are exactly one tile of 16 outputs by 32
// inputs. Scales are bf16 [blocks, outputs]; each block of inputs is summed in float32 and then scaled, so a row's result
// does not depend on how many rows there are.
//
// Blocks of 64 weights are cut from the whole matrix. Where a row is no multiple of 64, the next one begins inside a block.
// Outputs whose rows begin at the same place in a block are packed together, as if that many more inputs were before
// their first, which are 0, as those are that fill up the last block: for these outputs, x begins earlier.

#include "kernels.h"
#include "tiles.h"

#include <omp.h>
#include <stdint.h>
#include <string.h>

static const float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

static inline void accumulate(float *total, const float *sums, int64_t rows, vec low, vec high) {
    for (int64_t i = 0; i < rows * NF4_OUTPUTS; i += NF4_OUTPUTS) {
        vstore(total + i, vfma(vload(sums + i), low, vload(total + i)));
        vstore(total + i + 16, vfma(vload(sums + i + 16), high, vload(total + i + 16)));
    }
}

// Packed outputs from `first` on to their places in a row.
static inline void put(const Nf4 *layer, int64_t first, vec low, vec high, uint16_t *out) {
    const int32_t *place = layer->place ? layer->place + first : NULL;
    if (!place || place[NF4_OUTPUTS - 1] - place[0] == NF4_OUTPUTS - 1) {  // they ascend
        out += place ? place[0] : first;
        vstore_bf16(out, low);
        vstore_bf16(out + 16, high);
        return;
    }
    uint16_t room[NF4_OUTPUTS];
    vstore_bf16(room, low);
    vstore_bf16(room + 16, high);
    for (int i = 0; i < NF4_OUTPUTS && place[i] >= 0; i++) out[place[i]] = room[i];
}

static void finish(const Nf4 *layer, int64_t rows, int64_t first, const float *total, uint16_t *out) {
    for (int64_t row = 0; row < rows; row++, out += layer->out, total += NF4_OUTPUTS) {
        vec low = vload(total), high = vload(total + 16);
        if (layer->bias) {  // added to what was rounded, as torch does
            low = vadd(vround_bf16(low), vload_bf16(layer->bias + first));
            high = vadd(vround_bf16(high), vload_bf16(layer->bias + first + 16));
        }
        put(layer, first, low, high, out);
    }
}

// One block of inputs times 32 outputs for up to NF4_ROWS rows, scaled, onto total [rows][32].
static void multiply_block(const Nf4 *layer, int64_t block, int64_t first, int64_t rows, const uint16_t *x,
                           const Decoded *decoded, float *total) {
    float sums[2 * TILE_ROWS * NF4_OUTPUTS] __attribute__((aligned(64)));
    const uint16_t *scale = layer->scale + block * layer->groups * NF4_OUTPUTS + first;
    const vec low = vload_bf16(scale), high = vload_bf16(scale + 16);
    for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS) {
        const int64_t count = rows - row < 2 * TILE_ROWS ? rows - row : 2 * TILE_ROWS;
        nf4_multiply(count, x + row * layer->stride + block * NF4_BLOCK, layer->stride, decoded, sums);
        accumulate(total + row * NF4_OUTPUTS, sums, count, low, high);
    }
}

void nf4_share(const Nf4 *layer, int64_t rows, const uint16_t *x, uint16_t *out, float *scratch) {
    const int64_t blocks = layer->blocks, k = blocks * NF4_BLOCK;
    const Nf4Table table = nf4_table(NF4);
    // Looked up once for all rows; while one group of rows takes all of them, in the first level of the cache.
    Decoded *decoded = (Decoded *)(scratch + omp_get_thread_num() * k * NF4_SCRATCH);
    const int64_t keep = rows > NF4_ROWS ? DECODED : 0;
    float total[NF4_ROWS * NF4_OUTPUTS] __attribute__((aligned(64)));
    nf4_begin(rows);
#pragma omp for schedule(static) nowait
    for (int64_t group = 0; group < layer->groups; group++) {
        const int64_t first = group * NF4_OUTPUTS;
        const uint8_t *packed = layer->weight + first * (k / 2);
        const uint16_t *from = layer->shift ? x - layer->shift[group] : x;
        for (int64_t row = 0; row < rows; row += NF4_ROWS) {
            const int64_t count = rows - row < NF4_ROWS ? rows - row : NF4_ROWS;
            memset(total, 0, count * NF4_OUTPUTS * sizeof(float));
            for (int64_t block = 0; block < blocks; block++) {
                if (!row) nf4_decode(packed + block * (NF4_BLOCK / 2) * NF4_OUTPUTS, table, decoded + block * keep);
                multiply_block(layer, block, first, count, from + row * layer->stride, decoded + block * keep, total);
            }
            finish(layer, count, first, total, out + row * layer->out);
        }
    }
    tiles_end();
}

// out [rows, layer->out] bf16 = x [rows padded to 16, layer->stride] bf16 times the weights' transpose; x and scratch as
// nf4_share() takes them.
void nf4_matmul(const Nf4 *layer, int64_t rows, const uint16_t *x, uint16_t *out, float *scratch, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const uint64_t mode = flush_denormals();
        nf4_share(layer, rows, x, out, scratch);
        restore_denormals(mode);
    }
}
