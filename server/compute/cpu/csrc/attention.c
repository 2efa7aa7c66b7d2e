// Causal attention over paged keys and values, read in place.
//
// Keys and values: [blocks, kv_heads, size, width] bf16, size a multiple of 16. A tile has 16 columns: queries of one
// sequence that share a KV head (the heads of its group, for one or more rows). Scores are computed transposed, keys by
// columns, so that keys load straight from the cache, and the weights are summed as one more component of the values,
// which is 1. Keys are taken in steps aligned to their positions and a masked key adds an exact zero: a column's result
// depends on its own context alone, not on what shares its tile or how a prompt was cut into chunks.

#include "activations.h"
#include "kernels.h"
#include "tiles.h"

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define COLUMNS 16
#define AHEAD 64  // keys

// What a thread prefetches to its second-level cache while it computes: the context of the chunk it will most likely take
// next.
typedef struct {
    const Chunk *chunk;
    int64_t next, pairs;  // pair: keys and values of one head in one block
} Prefetch;

static inline const uint16_t *token(const Attention *job, const Chunk *chunk, const uint16_t *data, int64_t kv, int64_t position) {
    const int64_t block = job->tables[chunk->table + position / job->size];
    return data + ((block * job->kv_heads + kv) * job->size + position % job->size) * job->width;
}

// Prefetches 16 keys or values.
static inline void prefetch(const Attention *job, const Chunk *chunk, const uint16_t *data, int64_t kv, int64_t position) {
    const char *at = (const char *)token(job, chunk, data, kv, position);
    for (int64_t byte = 0; byte < 16 * job->width * 2; byte += 64) __builtin_prefetch(at + byte, 0, 3);
}

// The first position of whole steps that a query sees.
static inline int64_t first_seen(const Attention *job, int64_t position) {
    const int64_t earliest = position - job->window + 1;
    return job->window && earliest > 0 ? earliest / KEY_STEP * KEY_STEP : 0;
}

// The rows of a longer chunk find their keys in the cache: only a row by itself needs a prefetch.
static inline Prefetch plan_prefetch(const Attention *job, const Chunk *chunk) {
    if (chunk->rows > 1) return (Prefetch){chunk, 0, 0};
    const int64_t block = first_seen(job, chunk->start) / job->size;
    return (Prefetch){chunk, block * job->kv_heads, (chunk->start / job->size + 1) * job->kv_heads};
}

// A pair for every 32 keys scored or multiplied: a context as long as this one is there in time.
static inline void prefetch_pair(const Attention *job, Prefetch *ahead) {
    if (ahead->next == ahead->pairs) return;
    const int64_t kv = ahead->next % job->kv_heads, position = ahead->next / job->kv_heads * job->size;
    const char *keys = (const char *)token(job, ahead->chunk, job->keys, kv, position);
    const char *values = (const char *)token(job, ahead->chunk, job->values, kv, position);
    for (int64_t byte = 0; byte < job->size * job->width * 2; byte += 64) {
        __builtin_prefetch(keys + byte, 0, 2);
        __builtin_prefetch(values + byte, 0, 2);
    }
    ahead->next++;
}

// Scores of the keys from `first` to `end`, a multiple of 16 apart: [keys, columns], columns 16 or 4. far: they were not
// prefetched.
static void score(const Attention *job, const Chunk *chunk, int64_t kv, const uint32_t *pairs, int64_t columns,
                  int64_t first, int64_t end, int far, Prefetch *ahead, float *scores) {
    ivec room[ATTENTION_MAX_WIDTH];
    const Queries queries = score_begin(columns, job->width, pairs, room);
    for (int64_t key = first; key < end; key += 32, scores += 32 * columns) {
        const uint16_t *keys = token(job, chunk, job->keys, kv, key);
        const uint16_t *more = key + 16 < end ? token(job, chunk, job->keys, kv, key + 16) : NULL;
        prefetch_pair(job, ahead);
        for (int64_t then = key; far && then < key + 32 && then < end; then += 16) {
            if (then + AHEAD < end) prefetch(job, chunk, job->keys, kv, then + AHEAD);
            prefetch(job, chunk, job->values, kv, then);
        }
        score_multiply(columns, job->width, queries, keys, more, scores);
    }
}

// One vector of scores, scaled, capped and masked. here, last: positions of its keys and of its queries.
static inline vec mask_scores(const Attention *job, vec x, ivec here, ivec last) {
    x = vmul(x, vset1(job->scale));
    if (job->softcap > 0) x = soft_cap(x, vset1(job->softcap));
    mask seen = igreater(iadd(last, iset1(1)), here);
    if (job->window) seen = mand(seen, igreater(here, isub(last, iset1((int32_t)job->window))));
    return vselect(seen, x, vset1(-INFINITY));
}

static inline vec exponential(vec x, vec most) {
    return vselect(vdiffers(x, vset1(-INFINITY)), exp_negative(vsub(x, most)), vzero());
}

// Scores [keys, 16] become exponentials, as tiles [16 columns, KEY_STEP keys] bf16.
static void softmax(const Attention *job, const int32_t *positions, int64_t first, int64_t end, float *scores,
                    uint32_t *tiles) {
    const vec nothing = vset1(-INFINITY);
    const ivec last = iload(positions);
    vec most = nothing;
    float *at = scores;
    for (int64_t key = first; key < end; key++, at += COLUMNS) {
        const vec x = mask_scores(job, vload(at), iset1((int32_t)key), last);
        most = vmax(x, most);
        vstore(at, x);
    }
    at = scores;
    for (int64_t key = first; key < end; key += KEY_STEP, tiles += 256, at += KEY_STEP * COLUMNS) {
        ivec pairs[16];
        for (int j = 0; j < 16; j++) {
            const int inside = key + 2 * j < end;
            const vec even = inside ? vload(at + 2 * j * COLUMNS) : nothing;
            const vec odd = inside ? vload(at + (2 * j + 1) * COLUMNS) : nothing;
            pairs[j] = bf16_pairs(exponential(even, most), exponential(odd, most));
        }
        transpose(pairs);
        for (int j = 0; j < 16; j++) istore(tiles + j * 16, pairs[j]);
    }
}

// The same for up to 4 columns: scores [keys, 4], four keys in a vector; tiles [4 columns, KEY_STEP keys].
static void softmax_narrow(const Attention *job, const int32_t *positions, int64_t first, int64_t end, float *scores,
                           uint32_t *tiles) {
    static const int32_t key_of_lane[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const vec nothing = vset1(-INFINITY);
    const ivec last = irepeat(positions), four = iload(key_of_lane);
    vec most = nothing;
    float *at = scores;
    for (int64_t key = first; key < end; key += 4, at += 16) {
        const vec x = mask_scores(job, vload(at), iadd(four, iset1((int32_t)key)), last);
        most = vmax(x, most);
        vstore(at, x);
    }
    most = vmax_of_fours(most);
    at = scores;
    for (int64_t key = first; key < end; key += KEY_STEP, tiles += 256, at += KEY_STEP * 4) {
        vec exponentials[8];
        for (int i = 0; i < 8; i++) {
            exponentials[i] = exponential(key + 4 * i < end ? vload(at + i * 16) : nothing, most);
        }
        store_columns(tiles, exponentials);
    }
}

// 32 keys' values, 32 components from `component`, as two tiles of pairs. Components come out in another order: the
// first tile has 0 to 3 of every 8, the second 4 to 7.
static inline void pair_values(const Attention *job, const Chunk *chunk, int64_t kv, int64_t component, int64_t key,
                               int64_t end, uint32_t *pairs) {
    const int64_t stride = job->width;
    for (int half = 0; half < 2; half++, pairs += 128) {
        // Past the end the weights are 0, and any finite value will do.
        const int64_t at = key + 16 * half < end ? key + 16 * half : key;
        const uint16_t *v = token(job, chunk, job->values, kv, at) + component;
        for (int j = 0; j < 8; j++, v += 2 * stride) {
            const ivec even = iload(v), odd = iload(v + stride);
            istore(pairs + j * 16, unpack_low16(even, odd));
            istore(pairs + 256 + j * 16, unpack_high16(even, odd));
        }
    }
}

// Result [2, columns, 16] = the tiles times 32 components of the values; sum [columns, 16], unless it is NULL, the tiles
// times ones.
static void mix(const Attention *job, const Chunk *chunk, int64_t kv, int64_t component, int64_t first, int64_t end,
                int64_t columns, const uint32_t *tiles, Prefetch *ahead, float *result, float *sum) {
    uint32_t pairs[2][512] __attribute__((aligned(64)));
    mix_zero(result, sum);
    pair_values(job, chunk, kv, component, first, end, pairs[0]);
    for (int64_t key = first; key < end; key += KEY_STEP, tiles += 256) {
        const int64_t step = (key - first) / KEY_STEP;
        prefetch_pair(job, ahead);
        // A tile that was just written loads slowly: the next ones are written first.
        if (key + KEY_STEP < end) pair_values(job, chunk, kv, component, key + KEY_STEP, end, pairs[~step & 1]);
        mix_add(columns, tiles, pairs[step & 1], result, sum);
    }
    mix_store(result, sum);
}

// 32 components of one column to their place, in their order.
static inline void put(const float *low, const float *high, vec scale, uint16_t *out) {
    vec first, second;
    interleave_fours(vmul(vload(low), scale), vmul(vload(high), scale), &first, &second);
    vstore_bf16(out, first);
    vstore_bf16(out + 16, second);
}

// Up to 16 columns of a chunk from `first_column`: column c is head c % group of row c / group.
static void attend_tile(const Attention *job, const Chunk *chunk, int64_t kv, int64_t first_column, int far, Prefetch *ahead,
                        float *scores, uint32_t *tiles) {
    const int64_t group = job->heads / job->kv_heads, words = job->width / 2;
    const int64_t left = chunk->rows * group - first_column, columns = left < COLUMNS ? left : COLUMNS;
    const int64_t room = columns <= 4 ? 4 : COLUMNS;
    uint32_t queries[COLUMNS * ATTENTION_MAX_WIDTH / 2] __attribute__((aligned(64)));
    int32_t positions[COLUMNS];
    int64_t heads[COLUMNS];
    for (int64_t c = 0; c < room; c++) {  // columns that are not there repeat the first, and are dropped
        const int64_t column = first_column + (c < columns ? c : 0), row = column / group;
        positions[c] = (int32_t)(chunk->start + row);
        heads[c] = ((chunk->row + row) * job->heads + kv * group + column % group) * job->width;
        const uint16_t *query = job->q + heads[c];
        for (int64_t w = 0; w < words; w++) memcpy(queries + w * room + c, query + 2 * w, 4);
    }
    const int64_t first = first_seen(job, positions[0]);
    const int64_t end = (positions[columns - 1] / 16 + 1) * 16;
    score(job, chunk, kv, queries, room, first, end, far, ahead, scores);
    (room == 4 ? softmax_narrow : softmax)(job, positions, first, end, scores, tiles);

    float result[512] __attribute__((aligned(64))), sum[256] __attribute__((aligned(64)));
    mix_begin(room);
    for (int64_t component = 0; component < job->width; component += 32) {
        mix(job, chunk, kv, component, first, end, room, tiles, ahead, result, component ? NULL : sum);
        for (int64_t c = 0; c < columns; c++) {
            put(result + c * 16, result + 256 + c * 16, vset1(1.0f / sum[c * 16]), job->out + heads[c] + component);
        }
    }
}

void attention_units(const Attention *job, int64_t chunks, const Chunk *chunk, int64_t *units) {
    const int64_t group = job->heads / job->kv_heads;
    units[0] = 0;
    for (int64_t i = 0; i < chunks; i++) {
        units[i + 1] = units[i] + job->kv_heads * ((chunk[i].rows * group + COLUMNS - 1) / COLUMNS);
    }
}

void attention_share(const Attention *job, int64_t chunks, const Chunk *chunk, const int64_t *units, float *scratch,
                     int64_t context) {
    const int64_t kv = job->kv_heads, threads = omp_get_num_threads();
    const int64_t together = chunks >= 4 * threads ? kv : 1;  // a thread that takes all heads reads whole blocks
    float *scores = scratch + omp_get_thread_num() * context * 24;
    uint32_t *tiles = (uint32_t *)(scores + context * COLUMNS);
    Prefetch ahead = {0};
    const Chunk *current = NULL;
    int64_t i = 0;
    int far = 1;
#pragma omp for schedule(monotonic : dynamic, together) nowait  // i only goes forward
    for (int64_t unit = 0; unit < units[chunks]; unit++) {
        while (unit >= units[i + 1]) i++;
        const int64_t part = unit - units[i];
        if (current != chunk + i) {
            current = chunk + i;
            far = current->rows == 1 && (ahead.chunk != current || ahead.next < ahead.pairs);
            ahead = together > 1 && i + threads < chunks ? plan_prefetch(job, current + threads) : (Prefetch){0};
        }
        attend_tile(job, current, part % kv, part / kv * COLUMNS, far, &ahead, scores, tiles);
    }
    tiles_end();
}

// q and out [rows, heads, width] bf16; chunks of rows that follow each other in one sequence, each with its blocks in
// tables. width a multiple of 32, at most 256. scratch: per thread, 24 * `context` words of 32 bits, context a multiple
// of 32 and at least the longest.
void attend(const Attention *job, int64_t chunks, const Chunk *chunk, float *scratch, int64_t context, int threads) {
    int64_t units[chunks + 1];
    attention_units(job, chunks, chunk, units);
#pragma omp parallel num_threads(threads)
    {
        const uint64_t mode = flush_denormals();
        attention_share(job, chunks, chunk, units, scratch, context);
        restore_denormals(mode);
    }
}
