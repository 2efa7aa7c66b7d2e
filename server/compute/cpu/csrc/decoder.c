// All decoder layers of a Llama-shaped model in one call, by one OpenMP team: a step is some 500 short phases, and starting
// each from Python costs more than most of them take. What each phase rounds to bf16 is what transformers' modules round.

#include "kernels.h"
#include "vec.h"

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef enum { NORM, NF4, LORA, PLACE, ATTENTION, GATE, HEAD } Phase;

// Time since `at` goes to a phase. Phases end slots the thread does, or at a barrier, which is then theirs too.
static inline void lap(const Step *step, Phase phase, double *at) {
    if (!step->seconds || omp_get_thread_num()) return;
    const double now = omp_get_wtime();
    step->seconds[phase] += now - *at;
    *at = now;
}

// to = weight * (x / rms(x)), x [n] bf16; n a multiple of 16.
static void rms_norm(const uint16_t *x, const uint16_t *weight, int64_t n, float eps, uint16_t *to) {
    vec sum = vzero();
    for (int64_t i = 0; i < n; i += 16) {
        const vec v = vload_bf16(x + i);
        sum = vfma(v, v, sum);
    }
    const vec scale = vset1(1.0f / sqrtf(vreduce_add(sum) / (float)n + eps));
    for (int64_t i = 0; i < n; i += 16) {
        vstore_bf16(to + i, vmul(vload_bf16(weight + i), vround_bf16(vmul(vload_bf16(x + i), scale))));
    }
}

static void add(uint16_t *x, const uint16_t *more, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) vstore_bf16(x + i, vadd(vload_bf16(x + i), vload_bf16(more + i)));
}

static void norm_share(const Model *model, const Step *step, const Workspace *work, const uint16_t *weight, int residual) {
    const int64_t n = model->hidden;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        if (residual) add(work->x + row * n, work->added + row * n, n);
        rms_norm(work->x + row * n, weight, n, model->eps, work->normed + row * n);
    }
}

// One head by its position's angles: x cos + (-x2, x1) sin. width a multiple of 32.
static void rotate(const uint16_t *x, const uint16_t *cosine, const uint16_t *sine, int64_t width, uint16_t *to) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const vec a = vload_bf16(x + i), b = vload_bf16(x + half + i);
        const vec low = vround_bf16(vmul(b, vload_bf16(sine + i)));
        const vec high = vround_bf16(vmul(a, vload_bf16(sine + half + i)));
        vstore_bf16(to + i, vsub(vround_bf16(vmul(a, vload_bf16(cosine + i))), low));
        vstore_bf16(to + half + i, vadd(vround_bf16(vmul(b, vload_bf16(cosine + half + i))), high));
    }
}

// Queries to work->q, keys and values to their place in the cache.
static void place_share(const Model *model, const Layer *layer, const Step *step, const Workspace *work) {
    const int64_t width = model->width, heads = model->heads, kv = model->kv_heads, all = heads + 2 * kv;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        uint16_t *from = work->wide + row * all * width;
        const uint16_t *cosine = step->cosine + row * width, *sine = step->sine + row * width;
        const int64_t block = step->slots[row] / model->size, offset = step->slots[row] % model->size;
        const int64_t at = (block * kv * model->size + offset) * width, head = model->size * width;
        for (int64_t i = 0; i < heads + kv; i++, from += width) {
            const uint16_t *norm = i < heads ? layer->q_norm : layer->k_norm;
            if (norm) rms_norm(from, norm, width, model->eps, from);
            rotate(from, cosine, sine, width,
                   i < heads ? work->q + (row * heads + i) * width : layer->keys + at + (i - heads) * head);
        }
        for (int64_t i = 0; i < kv; i++) memcpy(layer->values + at + i * head, from + i * width, width * 2);
    }
}

// x sigmoid(x): of x < 0 as e / (1 + e), e = exp(x), which cannot overflow.
static inline vec silu(vec x) {
    const vec one = vset1(1.0f), e = exp_negative(vsub(vzero(), vabs(x)));
    return vmul(x, vdiv(vselect(vless(x, vzero()), e, one), vadd(one, e)));
}

static void gate_share(const Model *model, const Step *step, const Workspace *work) {
    const int64_t n = model->intermediate;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < step->rows; row++) {
        const uint16_t *gate = work->wide + row * 2 * n, *up = gate + n;
        for (int64_t i = 0; i < n; i += 16) {
            vstore_bf16(work->act + row * n + i,
                       vmul(vround_bf16(silu(vload_bf16(gate + i))), vload_bf16(up + i)));
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
    const Attention job = {model->heads, model->kv_heads, model->width, model->size, layer->window, layer->scale,
                           0, work->q, layer->keys, layer->values, step->tables, work->mixed};
    attention_share(&job, step->chunks, step->chunk, units, work->scores, step->context);
#pragma omp barrier
    lap(step, ATTENTION, at);
    linear_share(&layer->o, step, work, active[1], work->mixed, work->added, at);
    norm_share(model, step, work, layer->post_norm, 1);
    lap(step, NORM, at);
    linear_share(&layer->gate_up, step, work, active[2], work->normed, work->wide, at);
    gate_share(model, step, work);
    lap(step, GATE, at);
    linear_share(&layer->down, step, work, active[3], work->act, work->added, at);
}

static void logits_share(const Model *model, const Step *step, const Workspace *work) {
    const int64_t n = model->hidden;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < step->sampled; i++) {
        uint16_t *x = work->x + step->sampled_rows[i] * n;
        add(x, work->added + step->sampled_rows[i] * n, n);
        rms_norm(x, model->final_norm, n, model->eps, work->normed + i * n);
    }
    head_share(step->sampled, model->vocabulary, n, work->normed, model->head, work->packed, step->logits);
#pragma omp barrier
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
            norm_share(model, step, work, model->layer[i].input_norm, i > 0);
            lap(step, NORM, &at);
            layer_share(model, model->layer + i, step, work, step->active + i * 4, units, &at);
        }
        if (step->sampled) logits_share(model, step, work);
        lap(step, HEAD, &at);
        restore_denormals(mode);
    }
}
