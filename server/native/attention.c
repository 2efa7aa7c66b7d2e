// Causal attention over paged keys and values, read in place, on Intel AMX.
//
// Keys and values: [blocks, size, kv_heads, width] bf16, size a multiple of 16. A tile has 16 columns: queries of one
// sequence that share a KV head (the heads of its group, for one or more rows). Scores are computed transposed, keys by
// columns, so that keys load straight from the cache and softmax needs no sums across lanes. Keys are taken in steps
// aligned to their positions and a masked key adds an exact zero: a column's result depends on its own context alone,
// not on what shares its tile or how a prompt was cut into chunks.

#include "kernels.h"
#include "tiles.h"

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define COLUMNS 16
#define STEP 32  // keys in a step of the product with the values
#define MAX_WIDTH 256

static inline __m512 cap(__m512 x, float softcap) {
    const __m512 limit = _mm512_set1_ps(softcap), one = _mm512_set1_ps(1.0f);
    __m512 e = exp_negative(_mm512_mul_ps(_mm512_set1_ps(-2.0f), _mm512_abs_ps(_mm512_div_ps(x, limit))));
    __m512 tanh = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(limit, _mm512_mask_sub_ps(tanh, negative, _mm512_setzero_ps(), tanh));
}

static inline __m512i widen(const uint16_t *p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
}

static inline __m512i bf16_pair(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

static inline const uint16_t *token(const Attention *job, const Run *run, const uint16_t *data, int64_t kv, int64_t position) {
    const int64_t block = job->tables[run->table + position / job->size];
    return data + ((block * job->size + position % job->size) * job->kv_heads + kv) * job->width;
}

// scores [keys, 16] of the keys from `first` to `end`, a multiple of 16 apart.
static void score(const Attention *job, const Run *run, int64_t kv, const uint32_t *queries, int64_t first, int64_t end,
                  float *scores) {
    const int64_t stride = job->kv_heads * job->width * 2;
    for (int64_t key = first; key < end; key += 16) {
        const uint16_t *k = token(job, run, job->keys, kv, key);
        _tile_zero(0);
        for (int64_t d = 0; d < job->width / 32; d++) {
            _tile_loadd(1, k + d * 32, stride);
            _tile_loadd(2, queries + d * 256, 64);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, scores + (key - first) * COLUMNS, 64);
    }
}

// Scores become exponentials, as tiles [16 columns, STEP keys] bf16; returns each column's 1 / sum.
static __m512 softmax(const Attention *job, const int32_t *positions, int64_t first, int64_t end, float *scores,
                      uint32_t *tiles) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    const __m512i last = _mm512_loadu_si512(positions);
    const __m512i before = _mm512_sub_epi32(last, _mm512_set1_epi32((int32_t)job->window));
    __m512 most = nothing, sum = _mm512_setzero_ps();
    for (int64_t key = first; key < end; key++) {
        float *at = scores + (key - first) * COLUMNS;
        const __m512i here = _mm512_set1_epi32((int32_t)key);
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(job->scale));
        if (job->softcap > 0) x = cap(x, job->softcap);
        __mmask16 seen = _mm512_cmple_epi32_mask(here, last);
        if (job->window) seen &= _mm512_cmpgt_epi32_mask(here, before);
        x = _mm512_mask_mov_ps(nothing, seen, x);
        most = _mm512_max_ps(x, most);
        _mm512_storeu_ps(at, x);
    }
    for (int64_t key = first; key < end; key += STEP, tiles += 256) {
        __m512i pairs[16];
        for (int j = 0; j < 16; j++) {
            __m512 e[2];
            for (int i = 0; i < 2; i++) {
                __m512 x = key + 2 * j < end ? _mm512_loadu_ps(scores + (key - first + 2 * j + i) * COLUMNS) : nothing;
                __mmask16 seen = _mm512_cmp_ps_mask(x, nothing, _CMP_NEQ_UQ);
                e[i] = _mm512_maskz_mov_ps(seen, exp_negative(_mm512_sub_ps(x, most)));
                sum = _mm512_add_ps(sum, e[i]);
            }
            pairs[j] = bf16_pair(e[0], e[1]);
        }
        transpose(pairs);
        for (int j = 0; j < 16; j++) _mm512_storeu_si512(tiles + j * 16, pairs[j]);
    }
    return _mm512_div_ps(_mm512_set1_ps(1.0f), sum);
}

// result [16 columns, 16] = the tiles times 16 components of the values.
static void mix(const Attention *job, const Run *run, int64_t kv, int64_t component, int64_t first, int64_t end,
                const uint32_t *tiles, float *result) {
    const int64_t stride = job->kv_heads * job->width;
    uint32_t pairs[256] __attribute__((aligned(64)));
    _tile_zero(0);
    for (int64_t key = first; key < end; key += STEP, tiles += 256) {
        for (int half = 0; half < 2; half++) {
            // Past the end the weights are 0, and any finite value will do.
            const int64_t at = key + 16 * half < end ? key + 16 * half : key;
            const uint16_t *v = token(job, run, job->values, kv, at) + component;
            for (int j = 0; j < 8; j++, v += 2 * stride) {
                __m512i pair = _mm512_or_si512(widen(v), _mm512_slli_epi32(widen(v + stride), 16));
                _mm512_store_si512(pairs + (half * 8 + j) * 16, pair);
            }
        }
        _tile_loadd(1, tiles, 64);
        _tile_loadd(2, pairs, 64);
        _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, result, 64);
}

// Columns `first_column` to + 15 of a run: column c is head c % group of row c / group.
static void attend_tile(const Attention *job, const Run *run, int64_t kv, int64_t first_column, float *scores, uint32_t *tiles) {
    const int64_t group = job->heads / job->kv_heads, words = job->width / 2;
    const int64_t left = run->rows * group - first_column, columns = left < COLUMNS ? left : COLUMNS;
    uint32_t queries[COLUMNS * MAX_WIDTH / 2] __attribute__((aligned(64)));
    int32_t positions[COLUMNS];
    int64_t heads[COLUMNS];
    memset(queries, 0, COLUMNS * job->width * 2);
    for (int64_t c = 0; c < COLUMNS; c++) {
        const int64_t column = first_column + (c < columns ? c : 0), row = column / group;
        positions[c] = (int32_t)(run->start + row);
        heads[c] = ((run->row + row) * job->heads + kv * group + column % group) * job->width;
        uint32_t query[MAX_WIDTH / 2];
        memcpy(query, job->q + heads[c], job->width * 2);
        for (int64_t w = 0; c < columns && w < words; w++) queries[w * COLUMNS + c] = query[w];
    }
    const int64_t earliest = positions[0] - job->window + 1;
    const int64_t first = job->window && earliest > 0 ? earliest / STEP * STEP : 0;
    const int64_t end = (positions[columns - 1] / 16 + 1) * 16;
    score(job, run, kv, queries, first, end, scores);
    float scale[COLUMNS], result[COLUMNS * 16] __attribute__((aligned(64)));
    _mm512_storeu_ps(scale, softmax(job, positions, first, end, scores, tiles));
    for (int64_t component = 0; component < job->width; component += 16) {
        mix(job, run, kv, component, first, end, tiles, result);
        for (int64_t c = 0; c < columns; c++) {
            __m512 x = _mm512_mul_ps(_mm512_load_ps(result + c * 16), _mm512_set1_ps(scale[c]));
            _mm256_storeu_si256((__m256i *)(job->out + heads[c] + component), (__m256i)_mm512_cvtneps_pbh(x));
        }
    }
}

void attention_units(const Attention *job, int64_t runs, const Run *run, int64_t *units) {
    const int64_t group = job->heads / job->kv_heads;
    units[0] = 0;
    for (int64_t i = 0; i < runs; i++) {
        units[i + 1] = units[i] + job->kv_heads * ((run[i].rows * group + COLUMNS - 1) / COLUMNS);
    }
}

void attention_share(const Attention *job, int64_t runs, const Run *run, const int64_t *units, float *scratch,
                     int64_t context) {
    float *scores = scratch + omp_get_thread_num() * context * 24;
    uint32_t *tiles = (uint32_t *)(scores + context * COLUMNS);
    whole_tiles();
    int64_t i = 0;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t unit = 0; unit < units[runs]; unit++) {
        while (unit >= units[i + 1]) i++;
        const int64_t part = unit - units[i];
        attend_tile(job, run + i, part % job->kv_heads, part / job->kv_heads * COLUMNS, scores, tiles);
    }
    _tile_release();
}

// q and out [rows, heads, width] bf16; runs of rows that follow each other in one sequence, each with its blocks in
// tables. width a multiple of 32, at most 256. scratch: per thread, 24 * `context` words of 32 bits, context a multiple
// of 32 and at least the longest.
void attend(const Attention *job, int64_t runs, const Run *run, float *scratch, int64_t context, int threads) {
    int64_t units[runs + 1];
    attention_units(job, runs, run, units);
#pragma omp parallel num_threads(threads)
    attention_share(job, runs, run, units, scratch, context);
}
