// NF4 matrix product on Intel AMX, in the weight layout of bitsandbytes' CPU kernel.
//
// Weights: for each 32 outputs, for each pair of inputs (k, k + 1), 32 bytes. Byte i holds output i / 2 (low nibble) and
// output 16 + i / 2 (high nibble) for input k + i % 2. Looked up, 16 such pairs are exactly one AMX tile of 16 outputs by
// 32 inputs. Scales are bf16 [inputs / block, outputs]; each block of inputs is summed in float32 and then scaled, so a
// row's result does not depend on how many rows there are.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ROWS 16     // of a tile
#define TILE_K 32   // inputs in a tile
#define BLOCK_N 32  // outputs decoded together

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} TileConfig;

static const float NF4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// Asks the kernel for the tile registers; 0 if this process may use them.
int amx_init(void) {
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("amx-bf16")) return 1;
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

static void configure_tiles(void) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 6; tile++) {
        config.rows[tile] = ROWS;
        config.bytes_per_row[tile] = 64;
    }
    _tile_loadconfig(&config);
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

static inline __m512 bf16_to_float(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

// One block of 64 inputs times 32 outputs for one tile of rows, unscaled, into sums [16][32].
static inline void multiply(const uint16_t *x, int64_t stride, const uint16_t *tiles, float *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, x, stride);
    _tile_loadd(3, tiles, 64);
    _tile_loadd(4, tiles + 512, 64);
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
    _tile_loadd(2, x + TILE_K, stride);
    _tile_loadd(3, tiles + 1024, 64);
    _tile_loadd(4, tiles + 1536, 64);
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
}

// out [m, n] bf16 = x [m padded to 16, k] bf16 times the weights' transpose. Blocks of 64 inputs; n a multiple of 32.
// scratch: per thread, 32 floats for each padded row.
void nf4_matmul(int64_t m, int64_t n, int64_t k, const uint16_t *x, const uint8_t *weight, const uint16_t *scale,
                uint16_t *out, float *scratch, int threads) {
    const int64_t padded = (m + ROWS - 1) / ROWS * ROWS, stride = k * 2, blocks = k / 64;
    const __m512i table = lookup_table();
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        thread = omp_get_thread_num();
#endif
        float *total = scratch + (int64_t)thread * padded * BLOCK_N;
        uint16_t tiles[4 * 512] __attribute__((aligned(64)));
        float sums[ROWS * BLOCK_N] __attribute__((aligned(64)));
        configure_tiles();
#pragma omp for schedule(static)
        for (int64_t nb = 0; nb < n / BLOCK_N; nb++) {
            const uint8_t *packed = weight + nb * BLOCK_N * (k / 2);
            memset(total, 0, padded * BLOCK_N * sizeof(float));
            for (int64_t block = 0; block < blocks; block++) {
                decode(packed + block * 32 * BLOCK_N, table, tiles);
                decode(packed + block * 32 * BLOCK_N + 16 * BLOCK_N, table, tiles + 1024);
                __m512 low = bf16_to_float(scale + block * n + nb * BLOCK_N);
                __m512 high = bf16_to_float(scale + block * n + nb * BLOCK_N + 16);
                for (int64_t row = 0; row < m; row += ROWS) {
                    multiply(x + row * k + block * 64, stride, tiles, sums);
                    int64_t rows = m - row < ROWS ? m - row : ROWS;
                    float *to = total + row * BLOCK_N;
                    for (int64_t i = 0; i < rows * BLOCK_N; i += BLOCK_N) {
                        _mm512_storeu_ps(to + i, _mm512_fmadd_ps(_mm512_load_ps(sums + i), low, _mm512_loadu_ps(to + i)));
                        _mm512_storeu_ps(to + i + 16,
                                         _mm512_fmadd_ps(_mm512_load_ps(sums + i + 16), high, _mm512_loadu_ps(to + i + 16)));
                    }
                }
            }
            for (int64_t row = 0; row < m; row++) {
                __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(total + row * BLOCK_N + 16),
                                                    _mm512_loadu_ps(total + row * BLOCK_N));
                memcpy(out + row * n + nb * BLOCK_N, &pair, 64);
            }
        }
        _tile_release();
    }
}
