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

// to = (weight + offset) * (x / rms(x)), x [n] bf16; n a multiple of 16. to may be x.
static void rms_norm(const Model *model, const uint16_t *x, const uint16_t *weight, int64_t n, uint16_t *to) {
    vec sum = vzero();
    for (int64_t i = 0; i < n; i += 16) {
        const vec v = vload_bf16(x + i);
        sum = vfma(v, v, sum);
    }
    const vec scale = vset1(1.0f / sqrtf(vreduce_add(sum) / (float)n + model->eps)), offset = vset1(model->norm_offset);
    for (int64_t i = 0; i < n; i += 16) {
        const vec v = vmul(vload_bf16(x + i), scale), w = vadd(vload_bf16(weight + i), offset);
        vstore_bf16(to + i, vmul(w, model->norm_rounds ? vround_bf16(v) : v));
    }
}

// x += multiplier * more
static void add(uint16_t *x, const uint16_t *more, int64_t n, float multiplier) {
    const vec scale = vset1(multiplier);
    for (int64_t i = 0; i < n; i += 16) {
        vstore_bf16(x + i, vadd(vload_bf16(x + i), vround_bf16(vmul(vload_bf16(more + i), scale))));
    }
}

// To one row of x what attention or the MLP made of it, through the norm `out` unless it is NULL.
static void add_residual(const Model *model, const uint16_t *out, const Workspace *work, int64_t row) {
    const int64_t n = model->hidden;
    uint16_t *added = work->added + row * n;
    if (out) rms_norm(model, added, out, n, added);
    add(work->x + row * n, added, n, model->residual_multiplier);
}

// work->normed = norm of work->x, after what was added to it, if anything. NULL for a norm: there is none.
static void norm_share(const Model *model, const Step *step, const Workspace *work, int added, const uint16_t *out,
                       const uint16_t *norm) {
    const int64_t n = model->hidden;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        if (added) add_residual(model, out, work, row);
        const uint16_t *x = work->x + row * n;
        uint16_t *to = work->normed + row * n;
        norm ? rms_norm(model, x, norm, n, to) : (void)memcpy(to, x, n * 2);
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

// The first `count` of x as bf16, all of them where there are more.
static inline void store_half(uint16_t *to, vec x, int64_t count) {
    if (count >= 16) {
        vstore_bf16(to, x);
        return;
    }
    uint16_t room[16];
    vstore_bf16(room, x);
    memcpy(to, room, count * 2);
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

// A row's queries and keys, side by side, through their norms, if there are any.
static void norm_heads(const Model *model, const Layer *layer, uint16_t *qk) {
    const int64_t width = model->width, queries = model->heads * width, keys = model->kv_heads * width;
    if (!layer->q_norm) return;
    const int64_t q_span = model->norms_all_heads ? queries : width, k_span = model->norms_all_heads ? keys : width;
    for (int64_t i = 0; i < queries; i += q_span) rms_norm(model, qk + i, layer->q_norm, q_span, qk + i);
    qk += queries;
    for (int64_t i = 0; i < keys; i += k_span) rms_norm(model, qk + i, layer->k_norm, k_span, qk + i);
}

// Queries to work->q, keys and values to their place in the cache.
static void place_share(const Model *model, const Layer *layer, const Step *step, const Workspace *work) {
    const int64_t width = model->width, cached = model->cached_width, heads = model->heads, kv = model->kv_heads;
    const int64_t rotated = layer->rotary < 0 ? 0 : model->rotary_width, stride = (model->rotary_width / 2 + 15) / 16 * 16;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        uint16_t *from = work->wide + row * (heads + 2 * kv) * width;
        const int64_t angles = (layer->rotary * step->rows + row) * stride;
        const int64_t block = step->slots[row] / model->size, offset = step->slots[row] % model->size;
        const int64_t at = (block * kv * model->size + offset) * cached, head = model->size * cached;
        norm_heads(model, layer, from);
        for (int64_t i = 0; i < heads + kv; i++, from += width) {
            uint16_t *to = i < heads ? work->q + (row * heads + i) * cached : layer->keys + at + (i - heads) * head;
            if (rotated) rotate(model, from, step->cosine + angles, step->sine + angles, to);
            memcpy(to + rotated, from + rotated, (width - rotated) * 2);
            memset(to + width, 0, (cached - width) * 2);
        }
        for (int64_t i = 0; i < kv; i++) memcpy(layer->values + at + i * head, from + i * width, width * 2);
    }
}

// What attention made of each head, without its padding; to work->q where there is any. Returns where.
static const uint16_t *unpad_share(const Model *model, const Step *step, const Workspace *work) {
    const int64_t width = model->width, cached = model->cached_width, heads = model->heads;
    if (width == cached) return work->mixed;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < step->rows * heads; i++) memcpy(work->q + i * width, work->mixed + i * cached, width * 2);
    return work->q;
}

static inline vec activate(int64_t activation, vec x) {
    return activation == GELU_TANH ? gelu_tanh(x) : activation == RELU_SQUARED ? relu_squared(x) : silu(x);
}

static void gate_share(const Model *model, const Step *step, const Workspace *work) {
    const int64_t n = model->intermediate;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        const uint16_t *gate = work->wide + row * (1 + model->gated) * n, *up = gate + n;
        for (int64_t i = 0; i < n; i += 16) {
            const vec x = vround_bf16(activate(model->activation, vload_bf16(gate + i)));
            vstore_bf16(work->act + row * n + i, model->gated ? vmul(x, vload_bf16(up + i)) : x);
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
    if (active) lora_shrink_share(&linear->lora, step->lora, active, linear->base.in, x, work->h);
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

static void layer_share(const Model *model, const Layer *layer, const Step *step, const Workspace *work,
                        const uint8_t *active, const int64_t *units, double *at) {
    linear_share(&layer->qkv, step, work, active[0], work->normed, work->wide, at);
    place_share(model, layer, step, work);
    lap(step, PLACE, at);
    const Attention job = {model->heads, model->kv_heads, model->cached_width, model->size, layer->window, layer->scale,
                           layer->softcap, work->q, layer->keys, layer->values, step->tables, work->mixed};
    attention_share(&job, step->chunks, step->chunk, units, work->scores, step->context);
#pragma omp barrier
    const uint16_t *mixed = unpad_share(model, step, work);
    lap(step, ATTENTION, at);
    linear_share(&layer->o, step, work, active[1], mixed, work->added, at);
    norm_share(model, step, work, 1, layer->attention_out_norm, layer->mlp_norm);
    lap(step, NORM, at);
    linear_share(&layer->gate_up, step, work, active[2], work->normed, work->wide, at);
    gate_share(model, step, work);
    lap(step, GATE, at);
    linear_share(&layer->down, step, work, active[3], work->act, work->added, at);
}

// What models do to their logits, in float32.
static void finish_logits_share(const Model *model, const Step *step) {
    const vec divisor = vset1(model->logits_divisor), limit = vset1(model->final_softcap);
    const int64_t n = step->sampled * model->vocabulary;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i += 16) {
        float room[16] = {0};
        const size_t bytes = (n - i < 16 ? n - i : 16) * sizeof(float);
        memcpy(room, step->logits + i, bytes);
        const vec x = vdiv(vload(room), divisor);
        vstore(room, model->final_softcap > 0 ? soft_cap(x, limit) : x);
        memcpy(step->logits + i, room, bytes);
    }
}

// The hidden states of `rows` [count] after the final norm, to `to` [count, hidden]. No row may come twice in a step.
static void final_norm_share(const Model *model, const Workspace *work, int64_t count, const int64_t *rows, uint16_t *to) {
    const int64_t n = model->hidden;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        add_residual(model, model->layer[model->layers - 1].mlp_out_norm, work, rows[i]);
        rms_norm(model, work->x + rows[i] * n, model->final_norm, n, to + i * n);
    }
}

static void logits_share(const Model *model, const Step *step, const Workspace *work) {
    const int64_t n = model->hidden;
    final_norm_share(model, work, step->sampled, step->sampled_rows, work->normed);
    head_share(step->sampled, model->vocabulary, n, work->normed, model->head, work->packed, step->logits);
#pragma omp barrier
    if (model->logits_divisor != 1 || model->final_softcap > 0) finish_logits_share(model, step);
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
            norm_share(model, step, work, i > 0, i > 0 ? layer[-1].mlp_out_norm : NULL, layer->attention_norm);
            lap(step, NORM, &at);
            layer_share(model, layer, step, work, step->active + i * 4, units, &at);
        }
        if (step->read) final_norm_share(model, work, step->read, step->hidden_rows, step->hidden);
        if (step->sampled) logits_share(model, step, work);
        lap(step, HEAD, &at);
        restore_denormals(mode);
    }
}
