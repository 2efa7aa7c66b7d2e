// NF4 matrix product on Intel AMX, in the weight layout of bitsandbytes' CPU kernel.
//
// Weights: for each 32 outputs, for each pair of inputs (k, k + 1), 32 bytes. Byte i holds output i / 2 (low nibble) and
// output 16 + i / 2 (high nibble) for input k + i % 2. Looked up, 16 such pairs are exactly one AMX tile of 16 outputs by
// 32 inputs. Scales are bf16 [inputs / block, outputs]; each block of inputs is summed in float32 and then scaled, so a
// row's result does not depend on how many rows there are.

#include "kernels.h"
#include "tiles.h"

#include <cpuid.h>
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROWS 16     // of a tile
#define TILE_K 32   // inputs in a tile
#define BLOCK_N 32  // outputs decoded together
#define GROUP 64    // rows whose sums stay in the first level of the cache

static const float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Asks the kernel for the tile registers; 0 if this process may use them.
int amx_init(void) {
    unsigned a, b, c, features = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &features)) return 1;
    const unsigned needed = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE: clang 14 does not know them by name
    if (!__builtin_cpu_supports("avx512bf16") || (features & needed) != needed) return 1;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) ? 2 : 0;
}

static __m512i lookup_table(void) {
    uint16_t table[32] = {0};
    for (int i = 0; i < 16; i++) {
        __m128bh pair = _mm_cvtneps_pbh(_mm_set1_ps(NF4[i]));
        memcpy(&table[i], &pair, 2);
    }
    return _mm512_loadu_si512(table);
}

// 16 pairs of inputs by 32 outputs: the tile of outputs 0 to 15, then that of 16 to 31.
static inline void decode(const uint8_t *packed, __m512i table, uint16_t *tiles) {
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int pair = 0; pair < ROWS; pair++) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(packed + pair * BLOCK_N));
        __m256i low = _mm256_and_si256(bytes, nibble);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        _mm512_store_si512(tiles + pair * 32, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(low), table));
        _mm512_store_si512(tiles + 512 + pair * 32, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(high), table));
    }
}

// One block of 64 inputs times 32 outputs for 16 rows, unscaled, into sums [16][32].
static inline void multiply(const uint16_t *x, int64_t stride, const uint16_t *tiles, float *sums) {
    _tile_zero(0);
    _tile_zero(1);
    for (int half = 0; half < 2; half++) {
        _tile_loadd(4, x + half * TILE_K, stride);
        _tile_loadd(6, tiles + half * 1024, 64);
        _tile_loadd(7, tiles + half * 1024 + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
}

// The same for 32 rows: every tile that is loaded is used twice.
static inline void multiply_two(const uint16_t *x, int64_t stride, const uint16_t *tiles, float *sums) {
    const uint16_t *below = x + ROWS * stride / 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int half = 0; half < 2; half++) {
        _tile_loadd(4, x + half * TILE_K, stride);
        _tile_loadd(6, tiles + half * 1024, 64);
        _tile_loadd(7, tiles + half * 1024 + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below + half * TILE_K, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + ROWS * BLOCK_N, 128);
    _tile_stored(3, sums + ROWS * BLOCK_N + 16, 128);
}

static inline void accumulate(float *total, const float *sums, int64_t rows, __m512 low, __m512 high) {
    for (int64_t i = 0; i < rows * BLOCK_N; i += BLOCK_N) {
        _mm512_storeu_ps(total + i, _mm512_fmadd_ps(_mm512_load_ps(sums + i), low, _mm512_loadu_ps(total + i)));
        _mm512_storeu_ps(total + i + 16,
                         _mm512_fmadd_ps(_mm512_load_ps(sums + i + 16), high, _mm512_loadu_ps(total + i + 16)));
    }
}

static void finish(const Nf4 *layer, int64_t rows, int64_t first, const float *total, uint16_t *out) {
    for (int64_t row = 0; row < rows; row++, out += layer->out, total += BLOCK_N) {
        __m512 low = _mm512_loadu_ps(total), high = _mm512_loadu_ps(total + 16);
        if (layer->bias) {  // added to what was rounded, as torch does
            low = _mm512_add_ps(round_bf16(low), load_bf16(layer->bias + first));
            high = _mm512_add_ps(round_bf16(high), load_bf16(layer->bias + first + 16));
        }
        store_bf16(out + first, low);
        store_bf16(out + first + 16, high);
    }
}

// One block of 64 inputs times 32 outputs for up to GROUP rows, scaled, onto total [rows][32].
static void multiply_block(const Nf4 *layer, int64_t block, int64_t first, int64_t rows, const uint16_t *x,
                           const uint16_t *tiles, float *total) {
    float sums[2 * ROWS * BLOCK_N] __attribute__((aligned(64)));
    const int64_t stride = layer->in * 2;
    const __m512 low = load_bf16(layer->scale + block * layer->out + first);
    const __m512 high = load_bf16(layer->scale + block * layer->out + first + 16);
    int64_t row = 0;
    for (; row + ROWS < rows; row += 2 * ROWS) {
        multiply_two(x + row * layer->in + block * 64, stride, tiles, sums);
        accumulate(total + row * BLOCK_N, sums, rows - row < 2 * ROWS ? rows - row : 2 * ROWS, low, high);
    }
    if (row < rows) {
        multiply(x + row * layer->in + block * 64, stride, tiles, sums);
        accumulate(total + row * BLOCK_N, sums, rows - row, low, high);
    }
}

void nf4_share(const Nf4 *layer, int64_t rows, const uint16_t *x, uint16_t *out, float *scratch) {
    const int64_t k = layer->in, blocks = k / 64;
    const __m512i table = lookup_table();
    // Looked up once for all rows; while one group of rows takes all of them, in the first level of the cache.
    uint16_t *decoded = (uint16_t *)(scratch + omp_get_thread_num() * k * BLOCK_N / 2);
    const int64_t keep = rows > GROUP ? 64 * BLOCK_N : 0;
    float total[GROUP * BLOCK_N] __attribute__((aligned(64)));
    TileConfig config = {0};
    for (int tile = 0; tile < 8; tile++) shape_tile(&config, tile, tile < 6 && rows < ROWS ? rows : ROWS, 64);
    load_shapes(&config);
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < layer->out; first += BLOCK_N) {
        const uint8_t *packed = layer->weight + first * (k / 2);
        for (int64_t row = 0; row < rows; row += GROUP) {
            const int64_t count = rows - row < GROUP ? rows - row : GROUP;
            memset(total, 0, count * BLOCK_N * sizeof(float));
            for (int64_t block = 0; block < blocks; block++) {
                uint16_t *tiles = decoded + block * keep;
                if (!row) {
                    decode(packed + block * 32 * BLOCK_N, table, tiles);
                    decode(packed + block * 32 * BLOCK_N + 16 * BLOCK_N, table, tiles + 1024);
                }
                multiply_block(layer, block, first, count, x + row * k, tiles, total);
            }
            finish(layer, count, first, total, out + row * layer->out);
        }
    }
    _tile_release();
}

// out [rows, layer->out] bf16 = x [rows padded to 16, layer->in] bf16 times the weights' transpose. Blocks of 64 inputs;
// outputs a multiple of 32. scratch: per thread, 16 floats for each input, aligned to 64 bytes.
void nf4_matmul(const Nf4 *layer, int64_t rows, const uint16_t *x, uint16_t *out, float *scratch, int threads) {
#pragma omp parallel num_threads(threads)
    nf4_share(layer, rows, x, out, scratch);
}
