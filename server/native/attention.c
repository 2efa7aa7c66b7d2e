// Attention of single queries over their own paged keys and values, read in place.
//
// Keys and values: [blocks, size, kv_heads, width] bf16. Sums and softmax in float32. A row's result depends on its own
// context alone.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

int attention_init(void) { return !__builtin_cpu_supports("avx512bf16"); }

static inline __m512 bf16_to_float(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

// exp(x) for x <= 0: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients), within 2 ulp.
static inline __m512 exp_negative(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// scores [n] become weights that sum to 1; the array is padded to a multiple of 16.
static void softmax(float *scores, int64_t n) {
    const int64_t padded = (n + 15) / 16 * 16;
    for (int64_t i = n; i < padded; i++) scores[i] = -INFINITY;
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < padded; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < padded; i += 16) {
        __m512 x = _mm512_loadu_ps(scores + i);
        __mmask16 real = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        __m512 e = _mm512_maskz_mov_ps(real, exp_negative(_mm512_sub_ps(x, most)));
        sum = _mm512_add_ps(sum, e);
        _mm512_storeu_ps(scores + i, e);
    }
    __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
    for (int64_t i = 0; i < padded; i += 16) _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), scale));
}

typedef struct {
    const uint16_t *data;   // this layer's keys or values, at the head in question
    const int64_t *blocks;  // of the sequence
    int64_t size, token;    // tokens in a block; elements from a token to the next
    int64_t first, end;     // positions
} Context;

// scores [end - first] = scale * query . key.
static void score(const Context *keys, const uint16_t *query, int64_t width, float scale, float *scores) {
    __m512bh q[8];
    for (int64_t d = 0; d < width / 32; d++) q[d] = (__m512bh)_mm512_loadu_si512(query + d * 32);
    for (int64_t at = keys->first; at < keys->end;) {
        const int64_t offset = at % keys->size, left = keys->size - offset;
        const int64_t n = left < keys->end - at ? left : keys->end - at;
        const uint16_t *k = keys->data + (keys->blocks[at / keys->size] * keys->size + offset) * keys->token;
        for (int64_t i = 0; i < n; i++, k += keys->token) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < width / 32; d++)
                sum = _mm512_dpbf16_ps(sum, q[d], (__m512bh)_mm512_loadu_si512(k + d * 32));
            *scores++ = scale * _mm512_reduce_add_ps(sum);
        }
        at += n;
    }
}

// out [64] bf16, a slice of the head: values weighted by weights [end - first].
static void mix(const Context *values, const float *weights, uint16_t *out, int64_t width) {
    __m512 sums[4];
    for (int64_t d = 0; d < 4; d++) sums[d] = _mm512_setzero_ps();
    for (int64_t at = values->first; at < values->end;) {
        const int64_t offset = at % values->size, left = values->size - offset;
        const int64_t n = left < values->end - at ? left : values->end - at;
        const uint16_t *v = values->data + (values->blocks[at / values->size] * values->size + offset) * values->token;
        for (int64_t i = 0; i < n; i++, v += values->token) {
            const __m512 weight = _mm512_set1_ps(*weights++);
            for (int64_t d = 0; d < 4; d++)
                if (d * 16 < width) sums[d] = _mm512_fmadd_ps(weight, bf16_to_float(v + d * 16), sums[d]);
        }
        at += n;
    }
    for (int64_t d = 0; d * 16 < width; d++)
        _mm256_storeu_si256((__m256i *)(out + d * 16), (__m256i)_mm512_cvtneps_pbh(sums[d]));
}

// q and out [rows, heads, width] bf16; table [rows, columns] of blocks; last [rows]: the position of each query, the
// last it sees; window: positions it sees, 0 for all. width a multiple of 32, at most 256. scratch: per thread,
// `context` floats, a multiple of 16 and at least the longest context.
void attend_rows(int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t size, const uint16_t *q,
                 const uint16_t *keys, const uint16_t *values, const int64_t *table, int64_t columns,
                 const int64_t *last, int64_t window, float scale, uint16_t *out, float *scratch, int64_t context,
                 int threads) {
    const int64_t group = heads / kv_heads;
#pragma omp parallel num_threads(threads)
    {
        extern int omp_get_thread_num(void);
        float *scores = scratch + omp_get_thread_num() * context;
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < rows * kv_heads; unit++) {
            const int64_t row = unit / kv_heads, kv = unit % kv_heads, end = last[row] + 1;
            Context k = {keys + kv * width, table + row * columns, size, kv_heads * width,
                         window && end > window ? end - window : 0, end};
            Context v = k;
            v.data = values + kv * width;
            for (int64_t g = 0; g < group; g++) {
                const int64_t head = (row * heads + kv * group + g) * width;
                score(&k, q + head, width, scale, scores);
                softmax(scores, k.end - k.first);
                for (int64_t d = 0; d < width; d += 64, v.data += 64)
                    mix(&v, scores, out + head + d, width - d < 64 ? width - d : 64);
                v.data = values + kv * width;
            }
        }
    }
}
