// LoRA for the rows of a batch on Intel AMX: every row has its own adapters; up to 16 rows with the same ones are a group
// and read them together.
//
// An adapter owns pages of 8 rank columns (server/engine/slots.py). A is [pages, members, in / 2, 8, 2] and B, for each member,
// [pages, out / 16, 4, 16, 2], both bf16: what is to be multiplied comes in pairs, as tiles want it, and every tile is
// read in one piece. B carries the scaling. Sums are float32, h = x A^T is rounded to bf16 between the products (as PEFT
// does), and the pages of a row are summed in the order the batch gives: a row's result depends on its own adapters alone.

#include "kernels.h"
#include "tiles.h"

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define PAGE 8
#define ROWS 16
#define CHUNK 192  // outputs in a unit of work: a multiple of 64
#define MAX_IN 16384
#define AHEAD 4096  // bytes

// Rows of x that follow each other as they are; others side by side in `gathered`. Returns where.
static const uint16_t *gather(const LoraGroup *group, const int32_t *row, int64_t in, const uint16_t *x,
                              uint16_t *gathered) {
    row += group->first;
    if (row[group->rows - 1] - row[0] == group->rows - 1) return x + row[0] * in;
    for (int i = 0; i < group->rows; i++) memcpy(gathered + i * in, x + row[i] * in, in * 2);
    return gathered;
}

// Has what follows brought near, as much as is read at once: 1 KiB.
static inline void prefetch(const uint16_t *at) {
    for (int line = 0; line < 16; line++) _mm_prefetch((const char *)at + AHEAD + line * 64, _MM_HINT_T0);
}

// h [16, 8] bf16 = weight * x [rows, in] times a [in / 2, 8, 2]. Even and odd steps have a sum of their own.
static void shrink(const uint16_t *x, const uint16_t *a, int64_t in, int64_t rows, float weight, uint16_t *h) {
    float even[ROWS * PAGE] __attribute__((aligned(64))), odd[ROWS * PAGE] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < in; k += 64) {
        prefetch(a + k * PAGE);
        _tile_loadd(2, x + k, in * 2);
        _tile_loadd(4, a + k * PAGE, 32);
        _tile_dpbf16ps(0, 2, 4);
        if (k + 32 == in) break;
        _tile_loadd(3, x + k + 32, in * 2);
        _tile_loadd(5, a + (k + 32) * PAGE, 32);
        _tile_dpbf16ps(1, 3, 5);
    }
    _tile_stored(0, even, 32);
    _tile_stored(1, odd, 32);
    for (int64_t i = 0; i < rows * PAGE; i += 16) {  // an odd number of rows reads 8 floats of nothing, and drops them
        __m512 sum = _mm512_add_ps(_mm512_load_ps(even + i), _mm512_load_ps(odd + i));
        store_bf16(h + i, _mm512_mul_ps(_mm512_set1_ps(weight), sum));
    }
}

void lora_shrink_share(const Lora *lora, const LoraBatch *batch, int active, int64_t in, const uint16_t *x, uint16_t *h) {
    static _Thread_local uint16_t gathered[ROWS * MAX_IN];
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
            TileConfig config = {0};
            for (int tile = 0; tile < 2; tile++) shape_tile(&config, tile, shaped, 32);
            for (int tile = 2; tile < 4; tile++) shape_tile(&config, tile, shaped, 64);
            for (int tile = 4; tile < 6; tile++) shape_tile(&config, tile, ROWS, 32);
            load_shapes(&config);
        }
        shrink(gather(group, batch->row, in, x, gathered), lora->a + (batch->page[page] * members + member) * in * PAGE,
               in, shaped, batch->weight[page], h + unit * ROWS * PAGE);
    }
    if (shaped) _tile_release();
}

// delta [rows, 64] = the group's h times 64 outputs of b, from `first` on; `count` of them are there (a multiple of 16).
static inline void expand(const LoraBatch *batch, const LoraGroup *group, const uint16_t *h, int64_t h_stride,
                          const uint16_t *b, int64_t out, int64_t first, int64_t count, float *delta) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t page = group->page; page < group->page + group->pages; page++) {
        const uint16_t *from = b + (batch->page[page] * out + first) * PAGE;
        prefetch(from);
        _tile_loadd(4, h + page * h_stride, PAGE * 2);
        _tile_loadd(5, from, 64);
        _tile_dpbf16ps(0, 4, 5);
        if (count > 16) {
            _tile_loadd(6, from + 16 * PAGE, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (count > 32) {
            _tile_loadd(7, from + 32 * PAGE, 64);
            _tile_dpbf16ps(2, 4, 7);
        }
        if (count > 48) {
            _tile_loadd(5, from + 48 * PAGE, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, delta, 256);
    _tile_stored(1, delta + 16, 256);
    _tile_stored(2, delta + 32, 256);
    _tile_stored(3, delta + 48, 256);
}

static void expand_chunk(const LoraBatch *batch, const LoraGroup *group, const uint16_t *h, int64_t h_stride,
                         const uint16_t *b, int64_t out, int64_t first, int64_t end, uint16_t *y, int64_t y_stride) {
    float delta[ROWS * 64] __attribute__((aligned(64)));
    for (int64_t at = first; at < end; at += 64) {
        const int64_t count = end - at < 64 ? end - at : 64;
        expand(batch, group, h, h_stride, b, out, at, count, delta);
        for (int64_t i = 0; i < group->rows; i++) {
            uint16_t *to = y + batch->row[group->first + i] * y_stride + at;
            for (int64_t c = 0; c < count; c += 16) {
                store_bf16(to + c, _mm512_add_ps(load_bf16(to + c), _mm512_load_ps(delta + i * 64 + c)));
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
            TileConfig config = {0};
            for (int tile = 0; tile < 4; tile++) shape_tile(&config, tile, shaped, 64);
            shape_tile(&config, 4, shaped, PAGE * 2);
            for (int tile = 5; tile < 8; tile++) shape_tile(&config, tile, PAGE / 2, 64);
            load_shapes(&config);
        }
        const int64_t first = (part - chunks[j]) * CHUNK, end = first + CHUNK < lora->out[j] ? first + CHUNK : lora->out[j];
        expand_chunk(batch, group, h + j * ROWS * PAGE, lora->members * ROWS * PAGE, lora->b[j], lora->out[j], first, end,
                     y[j], y_stride[j]);
    }
    if (shaped) _tile_release();
}

// Past the caches, for what is placed is read a step later and in whole; what is not in lines of 64 bytes, as usual.
static void copy_lines(char *to, const char *from, int64_t bytes) {
    if (((uintptr_t)to | (uintptr_t)bytes) & 63) {
        from ? (void)memcpy(to, from, bytes) : (void)memset(to, 0, bytes);
        return;
    }
    for (int64_t at = 0; at < bytes; at += 64) {
        _mm512_stream_si512((void *)(to + at), from ? _mm512_loadu_si512(from + at) : _mm512_setzero_si512());
    }
}

// `count` pieces of memory from one place to another; from NULL: zeros.
void write_pieces(int64_t count, char *const *to, const char *const *from, const int64_t *bytes, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 8) nowait
        for (int64_t i = 0; i < count; i++) copy_lines(to[i], from[i], bytes[i]);
        _mm_sfence();
    }
}

// Adds to y [rows, out] of each active member what the groups' adapters make of x [rows, in]. in a multiple of 32, at most
// MAX_IN, every out of 16. h: 128 values for each page of the batch and member.
void lora_rows(const Lora *lora, const LoraBatch *batch, int active, int64_t in, const uint16_t *x, uint16_t *const *y,
               const int64_t *y_stride, uint16_t *h, int threads) {
#pragma omp parallel num_threads(threads)
    {
        lora_shrink_share(lora, batch, active, in, x, h);
#pragma omp barrier
        lora_expand_share(lora, batch, active, h, y, y_stride);
    }
}
