// LoRA for the rows of a batch: every row has its own adapters; up to 16 rows with the same ones are a group
// and read them together.
//
// An adapter owns pages of 8 rank columns (server/engine/slots.py). A is [pages, members, in / 2, 8, 2] and B, for each member,
// [pages, out / 16, 4, 16, 2], both bf16 and filled up with zeros to whole tiles of 32 inputs and 16 outputs: what is to be multiplied comes in pairs, as tiles want it, and every tile is
// read in one piece. B carries the scaling. Sums are float32, h = x A^T is rounded to bf16 between the products (as PEFT
// does), and the pages of a row are summed in the order the batch gives: a row's result depends on its own adapters alone.

#include "kernels.h"
#include "tiles.h"

#include <stdint.h>
#include <string.h>

#define CHUNK 192  // outputs in a unit of work: a multiple of 64

// Rows of x that follow each other as they are; others side by side in `gathered`. Returns where.
static const uint16_t *gather(const LoraGroup *group, const int32_t *row, int64_t in, int64_t stride, const uint16_t *x,
                              uint16_t *gathered) {
    row += group->first;
    if (row[group->rows - 1] - row[0] == group->rows - 1) return x + row[0] * stride;
    for (int i = 0; i < group->rows; i++) memcpy(gathered + i * stride, x + row[i] * stride, in * 2);
    return gathered;
}

// h [16, 8] bf16 = weight * x [rows, in] times a [in / 2, 8, 2]. Even and odd tiles have a sum of their own.
static void shrink(const uint16_t *x, int64_t stride, const uint16_t *a, int64_t in, int64_t rows, float weight, uint16_t *h) {
    float even[TILE_ROWS * LORA_PAGE] __attribute__((aligned(64))), odd[TILE_ROWS * LORA_PAGE] __attribute__((aligned(64)));
    shrink_multiply(rows, in, x, stride, a, even, odd);
    for (int64_t i = 0; i < rows * LORA_PAGE; i += 16) {  // an odd number of rows reads 8 floats of nothing, and drops them
        vstore_bf16(h + i, vmul(vset1(weight), vadd(vload(even + i), vload(odd + i))));
    }
}

void lora_shrink_share(const Lora *lora, const LoraBatch *batch, int active, int64_t in, int64_t stride, const uint16_t *x,
                       uint16_t *h) {
    static _Thread_local uint16_t gathered[TILE_ROWS * LORA_MAX_INPUTS];
    const int64_t members = lora->members;
    int64_t shaped = 0, g = 0;
#pragma omp for schedule(static) nowait
    for (int64_t unit = 0; unit < batch->pages * members; unit++) {
        const int64_t page = unit / members, member = unit % members;
        if (!(active >> member & 1)) continue;
        while (page >= batch->group[g].page + batch->group[g].pages) g++;
        const LoraGroup *group = batch->group + g;
        if (shaped != group->rows) {
            shaped = group->rows;
            shrink_begin(shaped);
        }
        shrink(gather(group, batch->row, in, stride, x, gathered), stride,
               lora->a + (batch->page[page] * members + member) * in * LORA_PAGE, in, shaped, batch->weight[page],
               h + unit * TILE_ROWS * LORA_PAGE);
    }
    if (shaped) tiles_end();
}

// delta [rows, 64] = the group's h times 64 outputs of b, from `first` on; `count` of them are there.
static inline void expand(const LoraBatch *batch, const LoraGroup *group, const uint16_t *h, int64_t h_stride,
                          const uint16_t *b, int64_t out, int64_t first, int64_t count, float *delta) {
    expand_zero(delta);
    for (int64_t page = group->page; page < group->page + group->pages; page++) {
        expand_add(group->rows, h + page * h_stride, b + (batch->page[page] * whole(out, 16) + first) * LORA_PAGE, count, delta);
    }
    expand_store(delta);
}

static void expand_chunk(const LoraBatch *batch, const LoraGroup *group, const uint16_t *h, int64_t h_stride,
                         const uint16_t *b, int64_t out, int64_t first, int64_t end, uint16_t *y, int64_t y_stride) {
    float delta[TILE_ROWS * 64] __attribute__((aligned(64)));
    for (int64_t at = first; at < end; at += 64) {
        const int64_t count = end - at < 64 ? end - at : 64;
        expand(batch, group, h, h_stride, b, out, at, count, delta);
        for (int64_t i = 0; i < group->rows; i++) {
            uint16_t *to = y + batch->row[group->first + i] * y_stride + at;
            int64_t c = 0;
            for (; c + 16 <= count; c += 16) {
                vstore_bf16(to + c, vadd(vload_bf16(to + c), vload(delta + i * 64 + c)));
            }
            if (c < count) {  // what follows may be another thread's
                const vec before = vload_bf16_part(to + c, count - c);
                vstore_bf16_part(to + c, vadd(before, vload(delta + i * 64 + c)), count - c);
            }
        }
    }
}

void lora_expand_share(const Lora *lora, const LoraBatch *batch, int active, const uint16_t *h, uint16_t *const *y,
                       const int64_t *y_stride) {
    int64_t chunks[MEMBERS + 1] = {0}, shaped = 0;
    for (int64_t j = 0; j < lora->members; j++) {
        chunks[j + 1] = chunks[j] + (active >> j & 1 ? (lora->out[j] + CHUNK - 1) / CHUNK : 0);
    }
    const int64_t units = chunks[lora->members];
#pragma omp for schedule(static) nowait
    for (int64_t unit = 0; unit < batch->groups * units; unit++) {
        const LoraGroup *group = batch->group + unit / units;
        int64_t part = unit % units, j = 0;
        while (part >= chunks[j + 1]) j++;
        if (shaped != group->rows) {
            shaped = group->rows;
            expand_begin(shaped);
        }
        const int64_t first = (part - chunks[j]) * CHUNK, end = first + CHUNK < lora->out[j] ? first + CHUNK : lora->out[j];
        expand_chunk(batch, group, h + j * TILE_ROWS * LORA_PAGE, lora->members * TILE_ROWS * LORA_PAGE, lora->b[j], lora->out[j], first, end,
                     y[j], y_stride[j]);
    }
    if (shaped) tiles_end();
}

// Past the caches, for what is placed is read a step later and in whole; what is not in lines of 64 bytes, as usual.
static void copy_lines(char *to, const char *from, int64_t bytes) {
    if (((uintptr_t)to | (uintptr_t)bytes) & 63) {
        from ? (void)memcpy(to, from, bytes) : (void)memset(to, 0, bytes);
        return;
    }
    for (int64_t at = 0; at < bytes; at += 64) {
        stream_line(to + at, from ? iload(from + at) : izero());
    }
}

// `count` pieces of memory from one place to another; from NULL: zeros.
void write_pieces(int64_t count, char *const *to, const char *const *from, const int64_t *bytes, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 8) nowait
        for (int64_t i = 0; i < count; i++) copy_lines(to[i], from[i], bytes[i]);
        stream_fence();
    }
}

// Adds to y [rows, out] of each active member what the groups' adapters make of x [rows, in]. in a multiple of 32, at most
// LORA_MAX_INPUTS. h: 128 values for each page of the batch and member.
void lora_rows(const Lora *lora, const LoraBatch *batch, int active, int64_t in, const uint16_t *x, uint16_t *const *y,
               const int64_t *y_stride, uint16_t *h, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const uint64_t mode = flush_denormals();
        lora_shrink_share(lora, batch, active, in, in, x, h);
#pragma omp barrier
        lora_expand_share(lora, batch, active, h, y, y_stride);
        restore_denormals(mode);
    }
}
