// The kernels as parts of a team's work: each is called by every thread of an OpenMP team, shares its work among them
// and ends without a barrier unless it says so. Outside a team, one thread does it all. Buffers of `rows` rows are
// readable up to the next multiple of 16 rows.

#pragma once

#include <stdint.h>

// What Python has to know, too: compared with structures.py when the library is loaded (layout.c).
#define TILE_ROWS 16
#define TILE_INPUTS 32
#define NF4_BLOCK 64           // inputs that share a scale
#define NF4_OUTPUTS 32         // outputs that are packed together
#define NF4_SCRATCH 32         // floats for each packed input and thread
#define NF4_BORDER 64          // zeros before the first row of x, where stride > in
#define LORA_PAGE 8            // rank columns
#define LORA_MAX_INPUTS 49152
#define KEY_STEP 32            // keys that are multiplied with their values together
#define ATTENTION_WIDTH_STEP 32
#define ATTENTION_MAX_WIDTH 256  // of a head, a multiple of ATTENTION_WIDTH_STEP
#define ATTENTION_SCRATCH 24   // floats for each key and thread
#define HEAD_MIN_TOKENS 64     // of a vocabulary

// The next multiple of `step`.
static inline int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Python fills these structures in (structures.py). A field that is added here must be added there and in layout.c.

typedef struct {
    int64_t out, in;
    int64_t groups, blocks;  // of NF4_OUTPUTS outputs and NF4_BLOCK inputs, as they are packed
    int64_t stride;  // from a row of x to the next
    const uint8_t *weight;  // NF4, see nf4.c
    const uint16_t *scale, *bias;  // bias: [groups, NF4_OUTPUTS], NULL for none
    const int32_t *place;  // [groups, NF4_OUTPUTS]: which output it is, -1 for none. NULL: they are in their order
    const int32_t *shift;  // [groups]: inputs by which its first block begins before the row does. NULL as `place`
} Nf4;

typedef struct {
    int64_t row, rows, start, table;  // first row of the batch, rows, position of the first, offset into tables
} Chunk;

typedef struct {
    int64_t heads, kv_heads, width, size, window;  // window: positions a query sees, itself included, 0 for all
    float scale, softcap;  // softcap: 0 for none
    const uint16_t *q, *keys, *values;
    const int64_t *tables;
    uint16_t *out;
} Attention;

#define MEMBERS 3  // layers that share an input, at most

typedef struct {
    int64_t members;
    const uint16_t *a;  // see lora.c; NULL: no adapter has touched these layers yet
    const uint16_t *b[MEMBERS];
    int64_t out[MEMBERS];
} Lora;

typedef struct {
    int32_t first, rows, page, pages;  // offsets into rows and pages of LoraBatch, and how many
} LoraGroup;

typedef struct {
    int64_t groups, pages;  // pages: those of all groups together
    const LoraGroup *group;
    const int32_t *row, *page;
    const float *weight;  // of each page
} LoraBatch;

typedef struct {
    Nf4 base;  // the members side by side
    Lora lora;
} Linear;

typedef struct {
    const uint16_t *weight, *bias;  // weight: NULL where there is no norm; bias: NULL for none
} Norm;

typedef struct {
    Norm attention_norm, attention_out_norm, mlp_norm, mlp_out_norm;  // before attention, after it, before the MLP, after it
    Norm q_norm, k_norm;
    Linear qkv, o, gate_up, down;
    uint16_t *keys, *values;  // [blocks, kv_heads, size, cached_width], zeros where they are padded
    int64_t window;
    int64_t rotary;  // which of the step's tables of angles, -1 for none
    float scale, softcap;
} Layer;

typedef enum { SILU, GELU_TANH, RELU_SQUARED, GELU } Activation;

// How the MLP follows attention: on what attention added to x; or both on the same norm of x, which gets first what attention
// and then what the MLP made; or both on norms of x, which gets their sum.
typedef enum { SEQUENTIAL, IN_TURN, SUMMED } Residual;

typedef struct {
    int64_t layers, hidden, intermediate, heads, kv_heads;
    int64_t width, cached_width;  // of a head, and what it is in q, keys and values: padded with zeros
    int64_t size, vocabulary;
    int64_t stride;  // of Workspace.normed
    int64_t head_stride;      // from a head to the next in the outputs of qkv
    int64_t keys, values;     // where the first head's are in the outputs of qkv
    int64_t rotary_width;     // components of a head that are rotated
    int64_t activation;       // an Activation
    int64_t gated;            // 1: the MLP multiplies its activated gate by `up`; 0: it has no gate, and activates `up`
    int64_t norm_rounds;      // 1: what was divided by its RMS is rounded to bf16 before it is multiplied by the weight
    int64_t rotary_pairs;     // 1: neighbouring components are rotated together, 0: those half of rotary_width apart
    int64_t rotary_rounds;    // 1: angles and products are rounded to bf16 before they are added
    int64_t norms_all_heads;  // 1: q_norm and k_norm are over all heads together, 0: over each
    int64_t norm_centers;     // 1: norms subtract the mean first, LayerNorm; 0: RMSNorm
    int64_t residual;         // a Residual
    float eps;
    float norm_offset;  // added to the weight of every norm
    float residual_multiplier;  // of what attention and the MLP add
    float logits_divisor;
    float final_softcap;  // of the logits, 0 for none
    const Layer *layer;
    Norm final_norm;
    const uint16_t *head, *head_bias;  // head_bias: NULL for none
} Model;

typedef struct {
    int64_t rows, chunks, sampled, context;
    const Chunk *chunk;
    const int64_t *tables;
    const int64_t *slots;    // [rows] place in the cache, in tokens
    const float *cosine, *sine;  // [tables, rows, rotary_width / 2 rounded up to 16]
    const LoraBatch *lora;
    const uint8_t *active;   // [layers, 4]: qkv, o, gate_up, down
    const int64_t *sampled_rows;  // those whose logits are wanted
    float *logits;    // [sampled, vocabulary]
    double *seconds;  // NULL, or the first thread's time in each Phase is added here
    int64_t read;     // rows whose hidden states are wanted; none of them is in sampled_rows
    const int64_t *hidden_rows;  // [read]
    uint16_t *hidden;  // [read, hidden]: after the final norm
} Step;

// Workspace; rows rounded up to 16.
typedef struct {
    uint16_t *x;       // [rows, hidden]: embeddings when it begins
    uint16_t *normed;  // [rows, hidden] as NF4 layers take it; at the end the sampled rows
    uint16_t *wide;    // [rows, outputs of qkv or gate_up], and 32 more
    uint16_t *q, *mixed;  // [rows, heads * cached_width]; q also [rows, heads * width] as NF4 layers take it
    uint16_t *act;     // [rows, intermediate] as NF4 layers take it
    uint16_t *added;   // [rows, hidden]
    uint16_t *attended;  // [rows, hidden] where the residual is SUMMED
    uint16_t *h;
    uint32_t *packed;  // [rows, hidden in whole TILE_INPUTS]
    float *totals, *scores;
} Workspace;

// x: rows of layer->stride; where that is more than layer->in, zeros follow each row, and NF4_BORDER of them are before the
// first. scratch: for each thread, NF4_SCRATCH floats a packed input, aligned to 64 bytes. out: rows of layer->out.
void nf4_share(const Nf4 *layer, int64_t rows, const uint16_t *x, uint16_t *out, float *scratch);

// h: 128 values for each page of the batch and member. active: bit j for member j. in: a multiple of 32, with zeros in x
// past its inputs, whose rows are `stride` apart.
void lora_shrink_share(const Lora *lora, const LoraBatch *batch, int active, int64_t in, int64_t stride, const uint16_t *x,
                       uint16_t *h);
void lora_expand_share(const Lora *lora, const LoraBatch *batch, int active, const uint16_t *h, uint16_t *const *y,
                       const int64_t *y_stride);

// scratch: for each thread, ATTENTION_SCRATCH * context words of 32 bits. units [chunks + 1]: as attention_units() leaves it.
void attention_units(const Attention *job, int64_t chunks, const Chunk *chunk, int64_t *units);
void attention_share(const Attention *job, int64_t chunks, const Chunk *chunk, const int64_t *units, float *scratch,
                     int64_t context);

// logits [rows, vocabulary] float32 of x, rows `stride` apart, with zeros after `in` up to whole TILE_INPUTS; packed: [rows, in
// in whole TILE_INPUTS]. Has a barrier inside.
void head_share(int64_t rows, int64_t vocabulary, int64_t in, int64_t stride, const uint16_t *x, const uint16_t *weight,
                uint32_t *packed, float *logits);
