// All decoder layers of a model like Llama in one call, by one OpenMP team: a step is some 500 short phases, and starting
// each from Python costs more than most of them take. What each phase rounds to bf16 is what transformers' modules round.

#include "activations.h"
#include "kernels.h"
#include "vec.h"

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef enum { NORM, NF4, LORA, PLACE, ATTENTION, GATE, HEAD } Phase;

// Time since `at` goes to a phase. Phases end where the thread does, or at a barrier, which is then theirs too.
static inline void lap(const Step *step, Phase phase, double *at) {
    if (!step->seconds || omp_get_thread_num()) return;
    const double now = omp_get_wtime();
    step->seconds[phase] += now - *at;
    *at = now;
}

// The first `count` of x as bf16, all of them where there are more.
static inline void store_half(uint16_t *to, vec x, int64_t count) {
    count >= 16 ? vstore_bf16(to, x) : vstore_bf16_part(to, x, count);
}

// The first `count` lanes of x, and zeros.
static inline vec keep_first(vec x, int64_t count) {
    float room[16];
    vstore(room, x);
    memset(room + count, 0, (size_t)(16 - count) * sizeof(float));
    return vload(room);
}

// to = (weight + offset) * (x / rms(x)), x [n] bf16. to may be x.
static void rms_norm(const Model *model, const uint16_t *x, Norm norm, int64_t n, uint16_t *to) {
    vec sum = vzero();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const vec v = vload_bf16(x + i);
        sum = vfma(v, v, sum);
    }
    if (i < n) {
        const vec v = vload_bf16_part(x + i, n - i);
        sum = vfma(v, v, sum);
    }
    const vec scale = vset1(1.0f / sqrtf(vreduce_add(sum) / (float)n + model->eps)), offset = vset1(model->norm_offset);
    for (i = 0; i + 16 <= n; i += 16) {
        const vec v = vmul(vload_bf16(x + i), scale), w = vadd(vload_bf16(norm.weight + i), offset);
        vstore_bf16(to + i, vmul(w, model->norm_rounds ? vround_bf16(v) : v));
    }
    if (i < n) {
        const vec v = vmul(vload_bf16_part(x + i, n - i), scale);
        const vec w = vadd(vload_bf16_part(norm.weight + i, n - i), offset);
        vstore_bf16_part(to + i, vmul(w, model->norm_rounds ? vround_bf16(v) : v), n - i);
    }
}

// 16 of what layer_norm() makes, `count` of them where that is less.
static inline vec centered(const uint16_t *x, vec mean, int64_t count) {
    return count >= 16 ? vsub(vload_bf16(x), mean) : keep_first(vsub(vload_bf16_part(x, count), mean), count);
}

static inline vec load_some(const uint16_t *x, int64_t count) {
    return count >= 16 ? vload_bf16(x) : vload_bf16_part(x, count);
}

// to = (weight + offset) * (x - mean(x)) / deviation(x) + bias, x [n] bf16. to may be x.
static void layer_norm(const Model *model, const uint16_t *x, Norm norm, int64_t n, uint16_t *to) {
    vec sum = vzero(), squares = vzero();
    for (int64_t i = 0; i < n; i += 16) sum = vadd(sum, load_some(x + i, n - i));
    const vec mean = vset1(vreduce_add(sum) / (float)n), offset = vset1(model->norm_offset);
    for (int64_t i = 0; i < n; i += 16) {
        const vec v = centered(x + i, mean, n - i);
        squares = vfma(v, v, squares);
    }
    const vec scale = vset1(1.0f / sqrtf(vreduce_add(squares) / (float)n + model->eps));
    for (int64_t i = 0; i < n; i += 16) {
        const vec w = vadd(load_some(norm.weight + i, n - i), offset);
        vec v = vmul(w, vmul(centered(x + i, mean, n - i), scale));
        if (norm.bias) v = vadd(v, load_some(norm.bias + i, n - i));
        store_half(to + i, v, n - i);
    }
}

static void apply_norm(const Model *model, const uint16_t *x, Norm norm, int64_t n, uint16_t *to) {
    (model->norm_centers ? layer_norm : rms_norm)(model, x, norm, n, to);
}

// x += multiplier * more
static void add(uint16_t *x, const uint16_t *more, int64_t n, float multiplier) {
    const vec scale = vset1(multiplier);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        vstore_bf16(x + i, vadd(vload_bf16(x + i), vround_bf16(vmul(vload_bf16(more + i), scale))));
    }
    if (i < n) {
        const vec scaled = vround_bf16(vmul(vload_bf16_part(more + i, n - i), scale));
        vstore_bf16_part(x + i, vadd(vload_bf16_part(x + i, n - i), scaled), n - i);
    }
}

// To one row of x what attention or the MLP made of it, through the norm `out` if there is one.
static void add_residual(const Model *model, Norm out, const Workspace *work, int64_t row) {
    const int64_t n = model->hidden;
    uint16_t *added = work->added + row * n;
    if (model->residual == SUMMED) add(added, work->attended + row * n, n, 1);
    if (out.weight) apply_norm(model, added, out, n, added);
    add(work->x + row * n, added, n, model->residual_multiplier);
}

// work->normed = norm of work->x, after what was added to it, if anything: x itself where there is no norm. `norm` is NULL
// where work->normed is not needed, or stays.
static void norm_share(const Model *model, const Step *step, const Workspace *work, int added, Norm out,
                       const Norm *norm) {
    const int64_t n = model->hidden;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        if (added) add_residual(model, out, work, row);
        const uint16_t *x = work->x + row * n;
        uint16_t *to = work->normed + row * model->stride;
        if (norm) norm->weight ? apply_norm(model, x, *norm, n, to) : (void)memcpy(to, x, n * 2);
    }
}

// 16 pairs of components by their angles, a cos - b sin and b cos + a sin; to a and b.
static inline void turn(vec *a, vec *b, const float *cosine, const float *sine, int rounds) {
    const vec c = vload(cosine), s = vload(sine);
    vec a_cos = vmul(*a, c), b_sin = vmul(*b, s), b_cos = vmul(*b, c), a_sin = vmul(*a, s);
    if (rounds) {
        a_cos = vround_bf16(a_cos), b_sin = vround_bf16(b_sin);
        b_cos = vround_bf16(b_cos), a_sin = vround_bf16(a_sin);
    }
    *a = vsub(a_cos, b_sin), *b = vadd(b_cos, a_sin);
}

// The first `bytes` of x, all of it where there are more.
static inline void store_part(uint16_t *to, ivec x, int64_t bytes) {
    if (bytes >= 64) {
        istore(to, x);
        return;
    }
    char room[64];
    istore(room, x);
    memcpy(to, room, bytes);
}

// One head's rotated components. Reads up to 30 components past them, where the row's values are.
static void rotate(const Model *model, const uint16_t *x, const float *cosine, const float *sine, uint16_t *to) {
    const int64_t half = model->rotary_width / 2;
    const int rounds = model->rotary_rounds;
    for (int64_t i = 0; i < half; i += 16) {
        if (model->rotary_pairs) {
            const ivec pairs = iload(x + 2 * i);
            vec a = as_float(ishl(pairs, 16)), b = as_float(iand(pairs, iset1((int32_t)0xffff0000)));
            turn(&a, &b, cosine + i, sine + i, rounds);
            store_part(to + 2 * i, bf16_pairs(a, b), (half - i) * 4);
        } else {
            vec a = vload_bf16(x + i), b = vload_bf16(x + half + i);
            turn(&a, &b, cosine + i, sine + i, rounds);
            store_half(to + i, a, half - i);
            store_half(to + half + i, b, half - i);
        }
    }
}

// `count` heads through their norm.
static void norm_heads(const Model *model, Norm norm, int64_t count, uint16_t *heads) {
    const int64_t width = model->width;
    if (model->norms_all_heads) {
        apply_norm(model, heads, norm, count * width, heads);
        return;
    }
    for (int64_t i = 0; i < count; i++, heads += model->head_stride) apply_norm(model, heads, norm, width, heads);
}

// Queries to work->q, keys and values to their place in the cache.
static void place_share(const Model *model, const Layer *layer, const Step *step, const Workspace *work) {
    const int64_t width = model->width, cached = model->cached_width, heads = model->heads, kv = model->kv_heads;
    const int64_t rotated = layer->rotary < 0 ? 0 : model->rotary_width, stride = whole(model->rotary_width / 2, 16);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        uint16_t *queries = work->wide + row * layer->qkv.base.out, *keys = queries + model->keys;
        const uint16_t *values = queries + model->values;
        const int64_t angles = (layer->rotary * step->rows + row) * stride;
        const int64_t block = step->slots[row] / model->size, offset = step->slots[row] % model->size;
        const int64_t at = (block * kv * model->size + offset) * cached, head = model->size * cached;
        if (layer->q_norm.weight) {
            norm_heads(model, layer->q_norm, heads, queries);
            norm_heads(model, layer->k_norm, kv, keys);
        }
        for (int64_t i = 0; i < heads + kv; i++) {
            const uint16_t *from = i < heads ? queries + i * model->head_stride : keys + (i - heads) * model->head_stride;
            uint16_t *to = i < heads ? work->q + (row * heads + i) * cached : layer->keys + at + (i - heads) * head;
            if (rotated) rotate(model, from, step->cosine + angles, step->sine + angles, to);
            memcpy(to + rotated, from + rotated, (width - rotated) * 2);
            memset(to + width, 0, (cached - width) * 2);
        }
        for (int64_t i = 0; i < kv; i++) memcpy(layer->values + at + i * head, values + i * model->head_stride, width * 2);
    }
}

// What attention made of each head, as the next layer takes it: without the heads' padding, and with its own. To work->q
// where there is any. Returns where.
static const uint16_t *unpad_share(const Model *model, const Layer *layer, const Step *step, const Workspace *work) {
    const int64_t width = model->width, cached = model->cached_width, heads = model->heads;
    const int64_t in = heads * width, stride = layer->o.base.stride;
    if (width == cached && stride == in) return work->mixed;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        const uint16_t *from = work->mixed + row * heads * cached;
        uint16_t *to = work->q + row * stride;
        for (int64_t i = 0; i < heads; i++) memcpy(to + i * width, from + i * cached, width * 2);
        memset(to + in, 0, (stride - in) * 2);
    }
    return work->q;
}

static inline vec activate(int64_t activation, vec x) {
    switch (activation) {
        case GELU_TANH: return gelu_tanh(x);
        case RELU_SQUARED: return relu_squared(x);
        case GELU: return gelu(x);
        default: return silu(x);
    }
}

static void gate_share(const Model *model, const Layer *layer, const Step *step, const Workspace *work) {
    const int64_t n = model->intermediate, stride = layer->down.base.stride;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        const uint16_t *gate = work->wide + row * (1 + model->gated) * n, *up = gate + n;
        uint16_t *to = work->act + row * stride;
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            const vec x = vround_bf16(activate(model->activation, vload_bf16(gate + i)));
            vstore_bf16(to + i, model->gated ? vmul(x, vload_bf16(up + i)) : x);
        }
        if (i < n) {
            const vec x = vround_bf16(activate(model->activation, vload_bf16_part(gate + i, n - i)));
            vstore_bf16_part(to + i, model->gated ? vmul(x, vload_bf16_part(up + i, n - i)) : x, n - i);
        }
    }
}

// The base's product and the adapters' on top of it; ends with a barrier.
static void linear_share(const Linear *linear, const Step *step, const Workspace *work, int active, const uint16_t *x,
                         uint16_t *y, double *at) {
    uint16_t *ys[MEMBERS];
    int64_t strides[MEMBERS], offset = 0;
    for (int64_t j = 0; j < linear->lora.members; j++) {
        ys[j] = y + offset;
        strides[j] = linear->base.out;
        offset += linear->lora.out[j];
    }
    if (active) {
        lora_shrink_share(&linear->lora, step->lora, active, whole(linear->base.in, TILE_INPUTS), linear->base.stride, x, work->h);
    }
    lap(step, LORA, at);
    nf4_share(&linear->base, step->rows, x, y, work->totals);
#pragma omp barrier
    lap(step, NF4, at);
    if (active) {
        lora_expand_share(&linear->lora, step->lora, active, work->h, ys, strides);
#pragma omp barrier
        lap(step, LORA, at);
    }
}

// What the MLP takes of what attention made.
static void mlp_input_share(const Model *model, const Layer *layer, const Step *step, const Workspace *work) {
    switch (model->residual) {
        case SEQUENTIAL: norm_share(model, step, work, 1, layer->attention_out_norm, &layer->mlp_norm); break;
        case IN_TURN: norm_share(model, step, work, 1, layer->attention_out_norm, NULL); break;
        default: if (layer->mlp_norm.weight) norm_share(model, step, work, 0, (Norm){0}, &layer->mlp_norm);
    }
}

static void layer_share(const Model *model, const Layer *layer, const Step *step, const Workspace *work,
                        const uint8_t *active, const int64_t *units, double *at) {
    linear_share(&layer->qkv, step, work, active[0], work->normed, work->wide, at);
    place_share(model, layer, step, work);
    lap(step, PLACE, at);
    const Attention job = {model->heads, model->kv_heads, model->cached_width, model->size, layer->window, layer->scale,
                           layer->softcap, work->q, layer->keys, layer->values, step->tables, work->mixed};
    attention_share(&job, step->chunks, step->chunk, units, work->scores, step->context);
#pragma omp barrier
    const uint16_t *mixed = unpad_share(model, layer, step, work);
    lap(step, ATTENTION, at);
    uint16_t *attended = model->residual == SUMMED ? work->attended : work->added;
    linear_share(&layer->o, step, work, active[1], mixed, attended, at);
    mlp_input_share(model, layer, step, work);
    lap(step, NORM, at);
    linear_share(&layer->gate_up, step, work, active[2], work->normed, work->wide, at);
    gate_share(model, layer, step, work);
    lap(step, GATE, at);
    linear_share(&layer->down, step, work, active[3], work->act, work->added, at);
}

// What models do to their logits, in float32.
static void finish_logits_share(const Model *model, const Step *step) {
    const vec divisor = vset1(model->logits_divisor), limit = vset1(model->final_softcap);
    const int64_t n = model->vocabulary;
#pragma omp for collapse(2) schedule(static)
    for (int64_t row = 0; row < step->sampled; row++) {
        for (int64_t i = 0; i < n; i += 16) {
            float *at = step->logits + row * n + i, room[16];
            vec x = vload_part(at, n - i, 0);
            if (model->head_bias) x = vadd(x, load_some(model->head_bias + i, n - i));
            x = vdiv(x, divisor);
            vstore(room, model->final_softcap > 0 ? soft_cap(x, limit) : x);
            memcpy(at, room, (n - i < 16 ? n - i : 16) * sizeof(float));
        }
    }
}

// The hidden states of `rows` [count] after the final norm, to `to`, `stride` apart. No row may come twice in a step.
static void final_norm_share(const Model *model, const Workspace *work, int64_t count, const int64_t *rows, uint16_t *to,
                             int64_t stride) {
    const int64_t n = model->hidden;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        add_residual(model, model->layer[model->layers - 1].mlp_out_norm, work, rows[i]);
        apply_norm(model, work->x + rows[i] * n, model->final_norm, n, to + i * stride);
    }
}

static void logits_share(const Model *model, const Step *step, const Workspace *work) {
    const int64_t stride = model->stride;
    final_norm_share(model, work, step->sampled, step->sampled_rows, work->normed, stride);
    head_share(step->sampled, model->vocabulary, model->hidden, stride, work->normed, model->head, work->packed, step->logits);
#pragma omp barrier
    if (model->logits_divisor != 1 || model->final_softcap > 0 || model->head_bias) finish_logits_share(model, step);
}

// Embeddings in work->x to logits; writes the rows' keys and values.
void decode_step(const Model *model, const Step *step, const Workspace *work, int threads) {
    int64_t units[step->chunks + 1];
    const Attention shape = {.heads = model->heads, .kv_heads = model->kv_heads};
    attention_units(&shape, step->chunks, step->chunk, units);
#pragma omp parallel num_threads(threads)
    {
        const uint64_t mode = flush_denormals();
        double at = omp_get_wtime();
        for (int64_t i = 0; i < model->layers; i++) {
            const Layer *layer = model->layer + i;
            norm_share(model, step, work, i > 0, i > 0 ? layer[-1].mlp_out_norm : (Norm){0}, &layer->attention_norm);
            lap(step, NORM, &at);
            layer_share(model, layer, step, work, step->active + i * 4, units, &at);
        }
        if (step->read) final_norm_share(model, work, step->read, step->hidden_rows, step->hidden, model->hidden);
        if (step->sampled) logits_share(model, step, work);
        lap(step, HEAD, &at);
        restore_denormals(mode);
    }
}
