// LoRA for the rows of a batch: every row has its own adapters, and rows that share a page read it together.
//
// Pages as in server/slots.py: A is [pages, members, 8, in] and B, for each member, [pages, 8, out], both bf16; B carries
// the scaling. A use says that a row takes a page with a weight; uses are sorted by page. Sums are float32 throughout; a
// row's result depends on its own uses alone.

#include <immintrin.h>
#include <stdint.h>

#define PAGE 8
#define CHUNK 192  // outputs in a unit of work: a multiple of 16

typedef struct {
    int32_t page, row;
    float weight;
} Use;

int lora_init(void) { return !__builtin_cpu_supports("avx512bf16"); }

static inline __m512 bf16_to_float(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// Eight dot products of x [in] with the rows of a [8, in].
static inline void shrink(const uint16_t *x, const uint16_t *a, int64_t in, float weight, float *h) {
    __m512 sum[PAGE];
    for (int r = 0; r < PAGE; r++) sum[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < in; k += 32) {
        __m512bh v = (__m512bh)_mm512_loadu_si512(x + k);
        for (int r = 0; r < PAGE; r++) {
            sum[r] = _mm512_dpbf16_ps(sum[r], v, (__m512bh)_mm512_loadu_si512(a + r * in + k));
        }
    }
    for (int r = 0; r < PAGE; r++) h[r] = weight * _mm512_reduce_add_ps(sum[r]);
}

// y [count] bf16 += sum over uses of h [8] times b [8, out].
static void expand(uint16_t *y, int64_t count, const Use *uses, const int32_t *mine, int64_t n, const uint16_t *b,
                   int64_t out, const float *h, int64_t h_stride) {
    for (int64_t c = 0; c < count; c += 16) {
        __m512 sum = bf16_to_float(_mm256_loadu_si256((const __m256i *)(y + c)));
        for (int64_t i = 0; i < n; i++) {
            const uint16_t *page = b + (int64_t)uses[mine[i]].page * PAGE * out + c;
            const float *from = h + mine[i] * h_stride;
            for (int r = 0; r < PAGE; r++) {
                __m512 v = bf16_to_float(_mm256_loadu_si256((const __m256i *)(page + r * out)));
                sum = _mm512_fmadd_ps(_mm512_set1_ps(from[r]), v, sum);
            }
        }
        _mm256_storeu_si256((__m256i *)(y + c), (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

// uses [n] sorted by page; order [n] lists their indices row by row, row_start [rows + 1] says where each row's begin.
// For each member: b, y and out (b NULL: nothing to add), y with a stride in elements. in a multiple of 32, every out of
// 16. h: scratch of n * members * 8 floats.
void lora_rows(int64_t rows, int64_t in, int64_t members, const uint16_t *x, const Use *uses, int64_t n,
               const int32_t *order, const int32_t *row_start, const uint16_t *a, const uint16_t *const *b,
               uint16_t *const *y, const int64_t *out, const int64_t *y_stride, float *h, int threads) {
    int64_t chunks[members + 1];
    chunks[0] = 0;
    for (int64_t j = 0; j < members; j++) chunks[j + 1] = chunks[j] + (b[j] ? (out[j] + CHUNK - 1) / CHUNK : 0);
    const int64_t units = chunks[members];
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < n * members; unit++) {
            int64_t use = unit / members, j = unit % members;
            if (!b[j]) continue;
            shrink(x + uses[use].row * in, a + ((int64_t)uses[use].page * members + j) * PAGE * in, in, uses[use].weight,
                   h + unit * PAGE);
        }
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < rows * units; unit++) {
            int64_t row = unit / units, part = unit % units, j = 0;
            while (part >= chunks[j + 1]) j++;
            int64_t first = (part - chunks[j]) * CHUNK, count = out[j] - first < CHUNK ? out[j] - first : CHUNK;
            int64_t mine = row_start[row + 1] - row_start[row];
            if (mine) {
                expand(y[j] + row * y_stride[j] + first, count, uses, order + row_start[row], mine, b[j] + first, out[j],
                       h + j * PAGE, members * PAGE);
            }
        }
    }
}
