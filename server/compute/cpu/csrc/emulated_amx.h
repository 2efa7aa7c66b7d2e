// The tile instructions of AMX in C, for tests on processors without them: slow, and the same bits.
//
// Shapes and operands for which a processor would raise #GP or #UD are counted in tile_faults, and change nothing.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

extern int64_t tile_faults;  // since the library was loaded

static _Thread_local struct {
    int rows[8], bytes[8];
    uint8_t data[8][16][64];
} tiles;

// Whether `valid`; counts what is not.
static inline int tile_check(int valid) {
    if (!valid) __atomic_fetch_add(&tile_faults, 1, __ATOMIC_RELAXED);
    return valid;
}

static inline int tile_configured(int tile) { return tile_check(tiles.rows[tile] != 0); }

static void emulate_loadconfig(const void *config) {
    const uint8_t *at = (const uint8_t *)config;
    int rows[8], bytes[8], valid = at[0] == 1;
    for (int tile = 0; tile < 8; tile++) {
        rows[tile] = at[48 + tile];
        bytes[tile] = at[16 + 2 * tile] | at[17 + 2 * tile] << 8;
        valid &= rows[tile] <= 16 && bytes[tile] <= 64 && !rows[tile] == !bytes[tile];
    }
    for (int i = 8; i < 16; i++) valid &= !at[16 + 2 * i] && !at[17 + 2 * i] && !at[48 + i];
    if (!tile_check(valid)) return;
    memcpy(tiles.rows, rows, sizeof(rows));
    memcpy(tiles.bytes, bytes, sizeof(bytes));
    memset(tiles.data, 0, sizeof(tiles.data));
}

static void emulate_zero(int tile) {
    if (tile_configured(tile)) memset(tiles.data[tile], 0, sizeof(tiles.data[tile]));
}

static void emulate_loadd(int tile, const void *from, int64_t stride) {
    if (!tile_configured(tile)) return;
    memset(tiles.data[tile], 0, sizeof(tiles.data[tile]));
    for (int row = 0; row < tiles.rows[tile]; row++) {
        memcpy(tiles.data[tile][row], (const char *)from + row * stride, tiles.bytes[tile]);
    }
}

static void emulate_stored(int tile, void *to, int64_t stride) {
    if (!tile_configured(tile)) return;
    for (int row = 0; row < tiles.rows[tile]; row++) {
        memcpy((char *)to + row * stride, tiles.data[tile][row], tiles.bytes[tile]);
    }
}

static inline float emulated_bf16(const uint8_t *from) {
    uint16_t bits;
    memcpy(&bits, from, 2);
    const uint32_t word = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}

static int tile_operands_valid(int to, int a, int b) {
    return tiles.rows[to] && tiles.rows[a] && tiles.rows[b] && to != a && to != b && a != b &&
           tiles.bytes[to] % 4 == 0 && tiles.bytes[a] % 4 == 0 && tiles.rows[to] == tiles.rows[a] &&
           tiles.bytes[to] == tiles.bytes[b] && tiles.bytes[a] / 4 == tiles.rows[b];
}

static void emulate_dpbf16ps(int to, int a, int b) {
    if (!tile_check(tile_operands_valid(to, a, b))) return;
    for (int row = 0; row < tiles.rows[to]; row++) {
        for (int column = 0; column < tiles.bytes[to]; column += 4) {
            float sum, even = 0, odd = 0;
            for (int pair = 0; pair < tiles.bytes[a]; pair += 4) {
                const uint8_t *x = tiles.data[a][row] + pair, *y = tiles.data[b][pair / 4] + column;
                even = __builtin_fmaf(emulated_bf16(x), emulated_bf16(y), even);
                odd = __builtin_fmaf(emulated_bf16(x + 2), emulated_bf16(y + 2), odd);
            }
            memcpy(&sum, tiles.data[to][row] + column, 4);
            sum += even + odd;
            memcpy(tiles.data[to][row] + column, &sum, 4);
        }
    }
}

static void emulate_release(void) {
    memset(tiles.rows, 0, sizeof(tiles.rows));
    memset(tiles.bytes, 0, sizeof(tiles.bytes));
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulate_loadconfig
#define _tile_loadd emulate_loadd
#define _tile_stored emulate_stored
#define _tile_zero emulate_zero
#define _tile_dpbf16ps emulate_dpbf16ps
#define _tile_release emulate_release
