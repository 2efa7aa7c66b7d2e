// Causal attention over paged keys and values, read in place, on Intel AMX.
//
// Keys and values: [blocks, kv_heads, size, width] bf16, size a multiple of 16. A tile has 16 columns: queries of one
// sequence that share a KV head (the heads of its group, for one or more rows). Scores are computed transposed, keys by
// columns, so that keys load straight from the cache, and the weights are summed as one more component of the values,
// which is 1. Keys are taken in steps aligned to their positions and a masked key adds an exact zero: a column's result
// depends on its own context alone, not on what shares its tile or how a prompt was cut into chunks.

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
#define AHEAD 64  // keys

// What a thread brings to its second-level cache while it computes: the context of the run it will most likely take next.
typedef struct {
    const Run *run;
    int64_t next, pairs;  // pair: keys and values of one head in one block
} Ahead;

static inline __m512 cap(__m512 x, float softcap) {
    const __m512 limit = _mm512_set1_ps(softcap), one = _mm512_set1_ps(1.0f);
    __m512 e = exp_negative(_mm512_mul_ps(_mm512_set1_ps(-2.0f), _mm512_abs_ps(_mm512_div_ps(x, limit))));
    __m512 tanh = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(limit, _mm512_mask_sub_ps(tanh, negative, _mm512_setzero_ps(), tanh));
}

static inline __m512i bf16_pair(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

static inline const uint16_t *token(const Attention *job, const Run *run, const uint16_t *data, int64_t kv, int64_t position) {
    const int64_t block = job->tables[run->table + position / job->size];
    return data + ((block * job->kv_heads + kv) * job->size + position % job->size) * job->width;
}

// Has 16 keys or values brought near.
static inline void prefetch(const Attention *job, const Run *run, const uint16_t *data, int64_t kv, int64_t position) {
    const char *at = (const char *)token(job, run, data, kv, position);
    for (int64_t byte = 0; byte < 16 * job->width * 2; byte += 64) _mm_prefetch(at + byte, _MM_HINT_T0);
}

// The first position of whole steps that a query sees.
static inline int64_t first_seen(const Attention *job, int64_t position) {
    const int64_t earliest = position - job->window + 1;
    return job->window && earliest > 0 ? earliest / STEP * STEP : 0;
}

// The rows of a chunk find their keys in the cache: only a row by itself is looked ahead to.
static inline Ahead look_ahead(const Attention *job, const Run *run) {
    if (run->rows > 1) return (Ahead){run, 0, 0};
    const int64_t block = first_seen(job, run->start) / job->size;
    return (Ahead){run, block * job->kv_heads, (run->start / job->size + 1) * job->kv_heads};
}

// A pair for every 32 keys scored or multiplied: a context as long as this one is there in time.
static inline void bring(const Attention *job, Ahead *ahead) {
    if (ahead->next == ahead->pairs) return;
    const int64_t kv = ahead->next % job->kv_heads, position = ahead->next / job->kv_heads * job->size;
    const char *keys = (const char *)token(job, ahead->run, job->keys, kv, position);
    const char *values = (const char *)token(job, ahead->run, job->values, kv, position);
    for (int64_t byte = 0; byte < job->size * job->width * 2; byte += 64) {
        _mm_prefetch(keys + byte, _MM_HINT_T1);
        _mm_prefetch(values + byte, _MM_HINT_T1);
    }
    ahead->next++;
}

// Scores of the keys from `first` to `end`, a multiple of 16 apart: [keys, columns], columns 16 or 4. far: they were not
// brought.
static void score(const Attention *job, const Run *run, int64_t kv, const uint32_t *queries, int64_t columns,
                  int64_t first, int64_t end, int far, Ahead *ahead, float *scores) {
    const int64_t stride = job->width * 2;
    TileConfig config = {0};
    for (int tile = 0; tile < 2; tile++) shape_tile(&config, tile, 16, columns * 4);
    for (int tile = 2; tile < 4; tile++) shape_tile(&config, tile, 16, 64);
    shape_tile(&config, 4, 16, columns * 4);
    load_shapes(&config);
    for (int64_t key = first; key < end; key += 32, scores += 32 * columns) {
        const int two = key + 16 < end;
        const uint16_t *k = token(job, run, job->keys, kv, key);
        const uint16_t *more = two ? token(job, run, job->keys, kv, key + 16) : k;
        bring(job, ahead);
        for (int64_t then = key; far && then < key + 32 && then < end; then += 16) {
            if (then + AHEAD < end) prefetch(job, run, job->keys, kv, then + AHEAD);
            prefetch(job, run, job->values, kv, then);
        }
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < job->width / 32; d++) {
            _tile_loadd(4, queries + d * 16 * columns, columns * 4);
            _tile_loadd(2, k + d * 32, stride);
            _tile_dpbf16ps(0, 2, 4);
            _tile_loadd(3, more + d * 32, stride);
            _tile_dpbf16ps(1, 3, 4);
        }
        _tile_stored(0, scores, columns * 4);
        if (two) _tile_stored(1, scores + 16 * columns, columns * 4);
    }
}

// One vector of scores, scaled, capped and masked. here, last: positions of its keys and of its queries.
static inline __m512 seen_score(const Attention *job, __m512 x, __m512i here, __m512i last) {
    x = _mm512_mul_ps(x, _mm512_set1_ps(job->scale));
    if (job->softcap > 0) x = cap(x, job->softcap);
    __mmask16 seen = _mm512_cmple_epi32_mask(here, last);
    if (job->window) {
        seen &= _mm512_cmpgt_epi32_mask(here, _mm512_sub_epi32(last, _mm512_set1_epi32((int32_t)job->window)));
    }
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x);
}

static inline __m512 exponential(__m512 x, __m512 most) {
    const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    return _mm512_maskz_mov_ps(seen, exp_negative(_mm512_sub_ps(x, most)));
}

// Scores [keys, 16] become exponentials, as tiles [16 columns, STEP keys] bf16.
static void softmax(const Attention *job, const int32_t *positions, int64_t first, int64_t end, float *scores,
                    uint32_t *tiles) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    const __m512i last = _mm512_loadu_si512(positions);
    __m512 most = nothing;
    float *at = scores;
    for (int64_t key = first; key < end; key++, at += COLUMNS) {
        const __m512 x = seen_score(job, _mm512_loadu_ps(at), _mm512_set1_epi32((int32_t)key), last);
        most = _mm512_max_ps(x, most);
        _mm512_storeu_ps(at, x);
    }
    at = scores;
    for (int64_t key = first; key < end; key += STEP, tiles += 256, at += STEP * COLUMNS) {
        __m512i pairs[16];
        for (int j = 0; j < 16; j++) {
            const int inside = key + 2 * j < end;
            const __m512 even = inside ? _mm512_loadu_ps(at + 2 * j * COLUMNS) : nothing;
            const __m512 odd = inside ? _mm512_loadu_ps(at + (2 * j + 1) * COLUMNS) : nothing;
            pairs[j] = bf16_pair(exponential(even, most), exponential(odd, most));
        }
        transpose(pairs);
        for (int j = 0; j < 16; j++) _mm512_storeu_si512(tiles + j * 16, pairs[j]);
    }
}

// The same for up to 4 columns: scores [keys, 4], four keys in a vector; tiles [4 columns, STEP keys].
static void softmax_narrow(const Attention *job, const int32_t *positions, int64_t first, int64_t end, float *scores,
                           uint32_t *tiles) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    const __m512i last = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)positions));
    const __m512i four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    uint16_t order[32];  // from [8 keys, 4 columns] to [4 columns, 8 keys]
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i % 8 * 4 + i / 8);
    const __m512i by_column = _mm512_loadu_si512(order);
    __m512 most = nothing;
    float *at = scores;
    for (int64_t key = first; key < end; key += 4, at += 16) {
        const __m512i here = _mm512_add_epi32(four, _mm512_set1_epi32((int32_t)key));
        const __m512 x = seen_score(job, _mm512_loadu_ps(at), here, last);
        most = _mm512_max_ps(x, most);
        _mm512_storeu_ps(at, x);
    }
    most = _mm512_max_ps(most, _mm512_shuffle_f32x4(most, most, 0x4e));
    most = _mm512_max_ps(most, _mm512_shuffle_f32x4(most, most, 0xb1));
    at = scores;
    for (int64_t key = first; key < end; key += STEP, tiles += 256, at += STEP * 4) {
        __m512i p[4];
        for (int i = 0; i < 4; i++) {
            const int inside = key + 8 * i < end;
            const __m512 low = inside ? _mm512_loadu_ps(at + i * 32) : nothing;
            const __m512 high = inside ? _mm512_loadu_ps(at + i * 32 + 16) : nothing;
            const __m512bh both = _mm512_cvtne2ps_pbh(exponential(high, most), exponential(low, most));
            p[i] = _mm512_permutexvar_epi16(by_column, (__m512i)both);
        }
        const __m512i a = _mm512_shuffle_i32x4(p[0], p[1], 0x44), b = _mm512_shuffle_i32x4(p[2], p[3], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(p[0], p[1], 0xee), d = _mm512_shuffle_i32x4(p[2], p[3], 0xee);
        _mm512_storeu_si512(tiles, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(tiles + 16, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(tiles + 32, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(tiles + 48, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}

// 32 keys' values, 32 components from `component`, as two tiles of pairs. Components come out in another order: the
// first tile has 0 to 3 of every 8, the second 4 to 7.
static inline void pair_values(const Attention *job, const Run *run, int64_t kv, int64_t component, int64_t key,
                               int64_t end, uint32_t *pairs) {
    const int64_t stride = job->width;
    for (int half = 0; half < 2; half++, pairs += 128) {
        // Past the end the weights are 0, and any finite value will do.
        const int64_t at = key + 16 * half < end ? key + 16 * half : key;
        const uint16_t *v = token(job, run, job->values, kv, at) + component;
        for (int j = 0; j < 8; j++, v += 2 * stride) {
            const __m512i even = _mm512_loadu_si512(v), odd = _mm512_loadu_si512(v + stride);
            _mm512_store_si512(pairs + j * 16, _mm512_unpacklo_epi16(even, odd));
            _mm512_store_si512(pairs + 256 + j * 16, _mm512_unpackhi_epi16(even, odd));
        }
    }
}

// Result [2, columns, 16], sum [columns, 16] = the tiles times 32 components of the values, and times ones.
static void mix(const Attention *job, const Run *run, int64_t kv, int64_t component, int64_t first, int64_t end,
                const uint32_t *tiles, Ahead *ahead, float *result, float *sum) {
    uint32_t pairs[2][512] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    pair_values(job, run, kv, component, first, end, pairs[0]);
    for (int64_t key = first; key < end; key += STEP, tiles += 256) {
        const int64_t step = (key - first) / STEP;
        bring(job, ahead);
        // A tile that was just written loads slowly: the next ones are written first.
        if (key + STEP < end) pair_values(job, run, kv, component, key + STEP, end, pairs[~step & 1]);
        _tile_loadd(3, tiles, 64);
        _tile_loadd(4, pairs[step & 1], 64);
        _tile_dpbf16ps(0, 3, 4);
        _tile_loadd(5, pairs[step & 1] + 256, 64);
        _tile_dpbf16ps(1, 3, 5);
        _tile_dpbf16ps(2, 3, 6);
    }
    _tile_stored(0, result, 64);
    _tile_stored(1, result + 256, 64);
    _tile_stored(2, sum, 64);
}

// 32 components of one column to their place, in their order.
static inline void put(const float *low, const float *high, __m512 scale, uint16_t *out) {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const __m512 a = _mm512_mul_ps(_mm512_load_ps(low), scale), b = _mm512_mul_ps(_mm512_load_ps(high), scale);
    store_bf16(out, _mm512_permutex2var_ps(a, first, b));
    store_bf16(out + 16, _mm512_permutex2var_ps(a, second, b));
}

// Up to 16 columns of a run from `first_column`: column c is head c % group of row c / group.
static void attend_tile(const Attention *job, const Run *run, int64_t kv, int64_t first_column, int far, Ahead *ahead,
                        float *scores, uint32_t *tiles) {
    const int64_t group = job->heads / job->kv_heads, words = job->width / 2;
    const int64_t left = run->rows * group - first_column, columns = left < COLUMNS ? left : COLUMNS;
    const int64_t room = columns <= 4 ? 4 : COLUMNS;
    uint32_t queries[COLUMNS * MAX_WIDTH / 2] __attribute__((aligned(64)));
    int32_t positions[COLUMNS];
    int64_t heads[COLUMNS];
    for (int64_t c = 0; c < room; c++) {  // columns that are not there repeat the first, and are dropped
        const int64_t column = first_column + (c < columns ? c : 0), row = column / group;
        positions[c] = (int32_t)(run->start + row);
        heads[c] = ((run->row + row) * job->heads + kv * group + column % group) * job->width;
        const uint16_t *query = job->q + heads[c];
        for (int64_t w = 0; w < words; w++) memcpy(queries + w * room + c, query + 2 * w, 4);
    }
    const int64_t first = first_seen(job, positions[0]);
    const int64_t end = (positions[columns - 1] / 16 + 1) * 16;
    score(job, run, kv, queries, room, first, end, far, ahead, scores);
    (room == 4 ? softmax_narrow : softmax)(job, positions, first, end, scores, tiles);

    float result[512] __attribute__((aligned(64))), sum[256] __attribute__((aligned(64)));
    uint32_t ones[256] __attribute__((aligned(64)));
    for (int i = 0; i < 256; i++) ones[i] = 0x3f803f80;
    TileConfig config = {0};
    for (int tile = 0; tile < 4; tile++) shape_tile(&config, tile, room, 64);
    for (int tile = 4; tile < 7; tile++) shape_tile(&config, tile, 16, 64);
    load_shapes(&config);
    _tile_loadd(6, ones, 64);
    for (int64_t component = 0; component < job->width; component += 32) {
        mix(job, run, kv, component, first, end, tiles, ahead, result, sum);
        for (int64_t c = 0; c < columns; c++) {
            put(result + c * 16, result + 256 + c * 16, _mm512_set1_ps(1.0f / sum[c * 16]),
                job->out + heads[c] + component);
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
    const int64_t kv = job->kv_heads, threads = omp_get_num_threads();
    const int64_t together = runs >= 4 * threads ? kv : 1;  // a thread that takes all heads reads whole blocks
    float *scores = scratch + omp_get_thread_num() * context * 24;
    uint32_t *tiles = (uint32_t *)(scores + context * COLUMNS);
    Ahead ahead = {0};
    const Run *current = NULL;
    int64_t i = 0;
    int far = 1;
#pragma omp for schedule(monotonic : dynamic, together) nowait  // i only goes forward
    for (int64_t unit = 0; unit < units[runs]; unit++) {
        while (unit >= units[i + 1]) i++;
        const int64_t part = unit - units[i];
        if (current != run + i) {
            current = run + i;
            far = current->rows == 1 && (ahead.run != current || ahead.next < ahead.pairs);
            ahead = together > 1 && i + threads < runs ? look_ahead(job, current + threads) : (Ahead){0};
        }
        attend_tile(job, current, part % kv, part / kv * COLUMNS, far, &ahead, scores, tiles);
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
