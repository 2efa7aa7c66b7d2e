// Runs every kernel on inputs made here and prints a hash of what it computed, one line a case: for comparing processors
// that Python's tests do not run on (test_aarch64.py). Inputs come from integers and powers of two: the same everywhere.

#include "kernels.h"
#include "tiles.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define THREADS 2

int kernels_init(void);
void nf4_matmul(const Nf4 *layer, int64_t rows, const uint16_t *x, uint16_t *out, float *scratch, int threads);
void lora_rows(const Lora *lora, const LoraBatch *batch, int active, int64_t in, const uint16_t *x, uint16_t *const *y,
               const int64_t *y_stride, uint16_t *h, int threads);
void attend(const Attention *job, int64_t chunks, const Chunk *chunk, float *scratch, int64_t context, int threads);
void decode_step(const Model *model, const Step *step, const Workspace *work, int threads);
void row_peaks(int64_t rows, int64_t vocabulary, const float *logits, float *peaks, int64_t *tokens, int threads);
void draw_rows(int64_t rows, int64_t vocabulary, const float *logits, const float *temperatures, const double *u,
               int64_t *tokens, int threads);
void top_rows(int64_t rows, int64_t vocabulary, const float *logits, const float *temperatures, int64_t width,
              float *probs, int64_t *tokens, uint64_t *scratch, int threads);
void score_rows(int64_t rows, int64_t vocabulary, const float *logits, const int64_t *tokens, int64_t width,
                float *logprobs, int64_t *ranks, float *likely_logprobs, int64_t *likely, uint64_t *scratch, int threads);

static uint32_t random_bits(void) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32);
}

// Nearly normal, times 2^exponent: a sum of whole numbers, exact in float32.
static float random_float(int exponent) {
    int32_t sum = -4 * 32768 + 2;
    for (int i = 0; i < 4; i++) sum += random_bits() & 0xffff;
    return __builtin_ldexpf((float)sum, exponent - 15);
}

static uint16_t bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}

static void *room(int64_t bytes) {
    void *found = aligned_alloc(64, (bytes + 4096 + 63) / 64 * 64);
    memset(found, 0, bytes + 4096);
    return found;
}

static float *floats(int64_t count, int exponent) {
    float *x = room(count * 4);
    for (int64_t i = 0; i < count; i++) x[i] = random_float(exponent);
    return x;
}

static uint16_t *halves(int64_t count, int exponent) {
    uint16_t *x = room(count * 2);
    for (int64_t i = 0; i < count; i++) x[i] = bf16(random_float(exponent));
    return x;
}

static uint8_t *bytes(int64_t count) {
    uint8_t *x = room(count);
    for (int64_t i = 0; i < count; i++) x[i] = (uint8_t)random_bits();
    return x;
}

static uint64_t hash(uint64_t h, const void *data, int64_t count) {
    for (int64_t i = 0; i < count; i++) h = (h ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    return h;
}

static uint64_t start_hash(void) { return 14695981039346656037u; }

// NaN is NaN: which one, no processor promises.
static uint64_t hash_halves(const uint16_t *x, int64_t count) {
    uint64_t h = start_hash();
    for (int64_t i = 0; i < count; i++) {
        const uint16_t value = (x[i] & 0x7fff) > 0x7f80 ? 0x7fc0 : x[i];
        h = hash(h, &value, 2);
    }
    return h;
}

static void print(const char *name, int a, int b, uint64_t h) {
    printf("%s-%d-%d %016llx\n", name, a, b, (unsigned long long)h);
}

static Nf4 nf4_layer(int64_t in, int64_t out, int bias) {
    return (Nf4){.out = out, .in = in, .groups = out / NF4_OUTPUTS, .blocks = in / NF4_BLOCK, .stride = in,
                 .weight = bytes(in * out / 2), .scale = halves(in / NF4_BLOCK * out, -5), .bias = bias ? halves(out, 0) : NULL};
}

// Nearly 1; or so large that sums overflow; or so small that products are below the normal numbers, as some inputs are.
static int nf4_exponent(int size, int64_t input) { return size < 0 ? size + (int)(input % 8) : size + (int)(input / 6) - 26; }

static void nf4_products(void) {
    static const int rows[] = {1, 2, 3, 7, 16, 40, 100}, sizes[] = {0, 100, -128};
    Nf4 layer = nf4_layer(320, 96, 1);
    const uint16_t *bias = layer.bias;
    float *scratch = room(THREADS * layer.in * NF4_SCRATCH * 4);
    for (int i = 0; i < 7; i++) {
        for (int size = 0; size < 3; size++) {
            uint16_t *x = room((rows[i] + 15) / 16 * 16 * layer.in * 2), *out = room(rows[i] * layer.out * 2);
            for (int64_t j = 0; j < rows[i] * layer.in; j++) {
                x[j] = bf16(random_float(nf4_exponent(sizes[size], j % layer.in)));
            }
            layer.bias = sizes[size] < 0 ? NULL : bias;  // or it would hide what is small
            nf4_matmul(&layer, rows[i], x, out, scratch, THREADS);
            print("nf4", rows[i], sizes[size], hash_halves(out, rows[i] * layer.out));
        }
    }
}

// 50 outputs of 100 inputs: rows of every other one begin 36 weights before a block does.
static void odd_nf4_products(void) {
    enum { IN = 100, OUT = 50, COUNT = 20, STRIDE = 192 };
    int32_t place[2 * NF4_OUTPUTS], shift[2] = {0, 36};
    for (int i = 0; i < 2 * NF4_OUTPUTS; i++) place[i] = i % NF4_OUTPUTS < 25 ? i % NF4_OUTPUTS * 2 + i / NF4_OUTPUTS : -1;
    const Nf4 layer = {.out = OUT, .in = IN, .groups = 2, .blocks = 3, .stride = STRIDE, .weight = bytes(3 * 64 * 64 / 2),
                       .scale = halves(3 * 64, -5), .bias = halves(64, 0), .place = place, .shift = shift};
    uint16_t *x = (uint16_t *)room((NF4_BORDER + 32 * STRIDE) * 2) + NF4_BORDER, *out = room(COUNT * OUT * 2);
    for (int64_t i = 0; i < COUNT * IN; i++) x[i / IN * STRIDE + i % IN] = bf16(random_float(0));
    nf4_matmul(&layer, COUNT, x, out, room(THREADS * 3 * 64 * NF4_SCRATCH * 4), THREADS);
    print("odd", COUNT, 0, hash_halves(out, COUNT * OUT));
}

static LoraGroup groups[] = {{0, 2, 0, 2}, {2, 1, 2, 2}, {3, 16, 4, 1}, {19, 1, 5, 1}, {20, 2, 6, 2}};
static int32_t lora_row[] = {0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 3, 20, 21};
static int32_t lora_page[] = {0, 3, 1, 2, 4, 5, 5, 0};
static float lora_weight[] = {1, 1, 0.7f, -0.7f, 1, 0.3f, 0.3f, 1};
static const LoraBatch batch = {5, 8, groups, lora_row, lora_page, lora_weight};
#define ROWS 22
#define PAGES 6

static Lora lora_layers(int64_t in, int members, const int64_t *outs) {
    Lora lora = {.members = members, .a = halves(PAGES * members * in * LORA_PAGE, -3)};
    for (int i = 0; i < members; i++) {
        lora.b[i] = halves(PAGES * whole(outs[i], 16) * LORA_PAGE, -3);
        lora.out[i] = outs[i];
    }
    return lora;
}

static void lora(void) {
    static const int inputs[] = {32, 96, 576};
    for (int i = 0; i < 3; i++) {
        const int64_t outs[] = {208 - i, 64 - 5 * i};
        const Lora layers = lora_layers(inputs[i], 2, outs);
        const uint16_t *x = halves(ROWS * inputs[i], 0);
        uint16_t *y[] = {halves(ROWS * outs[0], 0), halves(ROWS * outs[1], 0)};
        lora_rows(&layers, &batch, 3, inputs[i], x, y, outs, room(batch.pages * 2 * 128 * 2), THREADS);
        for (int j = 0; j < 2; j++) print("lora", inputs[i], j, hash_halves(y[j], ROWS * outs[j]));
    }
}

static const int64_t tables[] = {3, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14};
static const Chunk chunks[] = {{0, 1, 37, 0}, {1, 1, 100, 3}, {2, 30, 10, 10}, {32, 1, 0, 13}};

static void attention(void) {
    static const int shapes[][3] = {{9, 3, 64}, {8, 1, 32}, {4, 2, 128}, {2, 1, 256}};
    static const int kinds[][2] = {{0, 0}, {20, 0}, {0, 5}};  // window, softcap
    for (int i = 0; i < 4; i++) {
        const int64_t heads = shapes[i][0], kv = shapes[i][1], width = shapes[i][2], count = 33 * heads * width;
        const uint16_t *keys = halves(20 * kv * 16 * width, 0), *values = halves(20 * kv * 16 * width, 0);
        const uint16_t *q = halves(count, 0);
        for (int kind = 0; kind < 3; kind++) {
            uint16_t *out = room(count * 2);
            const Attention job = {heads, kv, width, 16, kinds[kind][0], 0.125f, (float)kinds[kind][1],
                                   q, keys, values, tables, out};
            attend(&job, 4, chunks, room(THREADS * 128 * ATTENTION_SCRATCH * 4), 128, THREADS);
            print("attention", shapes[i][2], kind, hash_halves(out, count));
        }
    }
}

static void sampling(void) {
    enum { SAMPLED = 6, VOCABULARY = 1003, WIDTH = 20 };
    float *logits = floats(SAMPLED * VOCABULARY, 0);
    for (int i = 0; i < SAMPLED * VOCABULARY; i++) logits[i] *= (float)(1 << i / VOCABULARY);
    for (int i = 100; i < VOCABULARY; i++) logits[5 * VOCABULARY + i] = -__builtin_inff();
    const float temperatures[] = {1, 0.7f, 2, 1e-3f, 1, 5};
    const double u[] = {0.1, 0.9, 0.5, 0.01, 0.999, 0.3};
    float peaks[SAMPLED], probs[SAMPLED * WIDTH];
    int64_t tokens[SAMPLED], likeliest[SAMPLED * WIDTH];
    row_peaks(SAMPLED, VOCABULARY, logits, peaks, tokens, THREADS);
    print("peaks", 0, 0, hash(hash(start_hash(), peaks, sizeof(peaks)), tokens, sizeof(tokens)));
    draw_rows(SAMPLED, VOCABULARY, logits, temperatures, u, tokens, THREADS);
    print("draw", 0, 0, hash(start_hash(), tokens, sizeof(tokens)));
    top_rows(SAMPLED, VOCABULARY, logits, temperatures, WIDTH, probs, likeliest, room(THREADS * VOCABULARY * 8), THREADS);
    print("top", 0, 0, hash(hash(start_hash(), probs, sizeof(probs)), likeliest, sizeof(likeliest)));
    int64_t ranks[SAMPLED];
    uint64_t *keys = room(THREADS * VOCABULARY * 8);
    score_rows(SAMPLED, VOCABULARY, logits, tokens, WIDTH, peaks, ranks, probs, likeliest, keys, THREADS);
    print("scores", 0, 0, hash(hash(start_hash(), peaks, sizeof(peaks)), ranks, sizeof(ranks)));
    print("likeliest", 0, 0, hash(hash(start_hash(), probs, sizeof(probs)), likeliest, sizeof(likeliest)));
}

enum { LAYERS = 2, HIDDEN = 192, INNER = 320, HEADS = 4, KV = 2, HEAD = 32, TOKENS = 97, QUERIES = HEADS * HEAD };

static Linear linear(int64_t in, int members, const int64_t *outs, int bias) {
    int64_t out = 0;
    for (int i = 0; i < members; i++) out += outs[i];
    return (Linear){nf4_layer(in, out, bias), lora_layers(in, members, outs)};
}

static Layer layer(int64_t window) {
    const int64_t qkv[] = {QUERIES, KV * HEAD, KV * HEAD}, hidden[] = {HIDDEN}, inner[] = {INNER, INNER};
    return (Layer){
        .attention_norm = {.weight = halves(HIDDEN, 0)}, .mlp_norm = {.weight = halves(HIDDEN, 0)},
        .q_norm = {.weight = window ? halves(HEAD, 0) : NULL}, .k_norm = {.weight = window ? halves(HEAD, 0) : NULL},
        .qkv = linear(HIDDEN, 3, qkv, 1), .o = linear(QUERIES, 1, hidden, 0),
        .gate_up = linear(HIDDEN, 2, inner, 0), .down = linear(INNER, 1, hidden, 0),
        .keys = halves(8 * KV * 16 * HEAD, 0), .values = halves(8 * KV * 16 * HEAD, 0),
        .window = window, .scale = 0.25f};
}

// A prompt's 20 rows from its 6th token on, and two sequences that decode; keys and values of a window and of all.
static void model(void) {
    static const Chunk sequences[] = {{0, 20, 5, 0}, {20, 1, 40, 2}, {21, 1, 0, 5}};
    static const int64_t blocks[] = {1, 2, 3, 4, 5, 6}, sampled[] = {19, 20, 21};
    static const uint8_t active[LAYERS * 4] = {7, 1, 3, 1, 5, 0, 2, 1};
    const Layer layers[LAYERS] = {layer(0), layer(24)};
    const Model model = {
        .layers = LAYERS, .hidden = HIDDEN, .intermediate = INNER, .heads = HEADS, .kv_heads = KV,
        .width = HEAD, .cached_width = HEAD, .size = 16, .vocabulary = TOKENS, .stride = HIDDEN, .head_stride = HEAD,
        .keys = QUERIES, .values = QUERIES + KV * HEAD, .rotary_width = HEAD,
        .activation = SILU, .gated = 1, .norm_rounds = 1, .rotary_rounds = 1, .eps = 1e-5f,
        .residual_multiplier = 1, .logits_divisor = 1,
        .layer = layers, .final_norm = {.weight = halves(HIDDEN, 0)}, .head = halves(TOKENS * HIDDEN, -3)};
    int64_t slots[ROWS];
    for (int i = 0; i < 20; i++) slots[i] = blocks[(5 + i) / 16] * 16 + (5 + i) % 16;
    slots[20] = blocks[2 + 40 / 16] * 16 + 40 % 16, slots[21] = blocks[5] * 16;
    float *logits = room(3 * TOKENS * 4);
    const Step step = {
        .rows = ROWS, .chunks = 3, .sampled = 3, .context = 64, .chunk = sequences, .tables = blocks, .slots = slots,
        .cosine = floats(ROWS * HEAD / 2, -1), .sine = floats(ROWS * HEAD / 2, -1), .lora = &batch,
        .active = active, .sampled_rows = sampled, .logits = logits};
    const Workspace work = {
        .x = halves(32 * HIDDEN, 0), .normed = room(32 * HIDDEN * 2), .wide = room(32 * 2 * INNER * 2),
        .q = room(32 * QUERIES * 2), .mixed = room(32 * QUERIES * 2), .act = room(32 * INNER * 2),
        .added = room(32 * HIDDEN * 2), .h = room(batch.pages * MEMBERS * 128 * 2), .packed = room(32 * HIDDEN * 4),
        .totals = room(THREADS * INNER * NF4_SCRATCH * 4), .scores = room(THREADS * 64 * ATTENTION_SCRATCH * 4)};
    decode_step(&model, &step, &work, THREADS);
    print("logits", 0, 0, hash(start_hash(), logits, 3 * TOKENS * 4));
    for (int i = 0; i < LAYERS; i++) {
        print("keys", i, 0, hash_halves(layers[i].keys, 8 * KV * 16 * HEAD));
        print("values", i, 0, hash_halves(layers[i].values, 8 * KV * 16 * HEAD));
    }
}

int main(void) {
    if (kernels_init()) return 1;
    nf4_products();
    odd_nf4_products();
    lora();
    attention();
    sampling();
    model();
    return 0;
}
