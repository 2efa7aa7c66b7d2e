// Constants that Python has, too, and where the compiler put the fields of what Python fills in. Both are compared with
// structures.py when the library is loaded: an address that is written to the wrong place would be read as something else.

#include "kernels.h"
#include "tiles.h"

#include <stddef.h>
#include <stdint.h>

const int64_t constants[] = {
    MEMBERS,  NF4_BLOCK,            NF4_OUTPUTS,         NF4_SCRATCH,       NF4_BORDER,      LORA_PAGE,       LORA_MAX_INPUTS,
    TILE_ROWS, TILE_INPUTS,
    KEY_STEP, ATTENTION_WIDTH_STEP, ATTENTION_MAX_WIDTH, ATTENTION_SCRATCH, HEAD_MIN_TOKENS, SILU,            GELU_TANH,
    RELU_SQUARED, GELU, SEQUENTIAL, IN_TURN, SUMMED};
const int64_t constants_length = sizeof(constants) / sizeof(*constants);

#define AT(field) offsetof(STRUCTURE, field)

// For each structure its size, then its fields in order.
const int64_t layout[] = {
#define STRUCTURE Nf4
    sizeof(Nf4), AT(out), AT(in), AT(groups), AT(blocks), AT(stride), AT(weight), AT(scale), AT(bias), AT(place),
        AT(shift),
#undef STRUCTURE
#define STRUCTURE Chunk
    sizeof(Chunk), AT(row), AT(rows), AT(start), AT(table),
#undef STRUCTURE
#define STRUCTURE Attention
    sizeof(Attention), AT(heads), AT(kv_heads), AT(width), AT(size), AT(window), AT(scale), AT(softcap),
        AT(q), AT(keys), AT(values), AT(tables), AT(out),
#undef STRUCTURE
#define STRUCTURE Lora
    sizeof(Lora), AT(members), AT(a), AT(b), AT(out),
#undef STRUCTURE
#define STRUCTURE LoraGroup
    sizeof(LoraGroup), AT(first), AT(rows), AT(page), AT(pages),
#undef STRUCTURE
#define STRUCTURE LoraBatch
    sizeof(LoraBatch), AT(groups), AT(pages), AT(group), AT(row), AT(page), AT(weight),
#undef STRUCTURE
#define STRUCTURE Linear
    sizeof(Linear), AT(base), AT(lora),
#undef STRUCTURE
#define STRUCTURE Norm
    sizeof(Norm), AT(weight), AT(bias),
#undef STRUCTURE
#define STRUCTURE Layer
    sizeof(Layer), AT(attention_norm), AT(attention_out_norm), AT(mlp_norm), AT(mlp_out_norm), AT(q_norm), AT(k_norm),
        AT(qkv), AT(o), AT(gate_up), AT(down), AT(keys), AT(values), AT(window), AT(rotary), AT(scale), AT(softcap),
#undef STRUCTURE
#define STRUCTURE Model
    sizeof(Model), AT(layers), AT(hidden), AT(intermediate), AT(heads), AT(kv_heads), AT(width), AT(cached_width),
        AT(size), AT(vocabulary), AT(stride), AT(head_stride), AT(keys), AT(values), AT(rotary_width), AT(activation),
        AT(gated), AT(norm_rounds), AT(rotary_pairs), AT(rotary_rounds), AT(norms_all_heads),
        AT(norm_centers), AT(residual), AT(eps), AT(norm_offset), AT(residual_multiplier), AT(logits_divisor),
        AT(final_softcap), AT(layer), AT(final_norm), AT(head), AT(head_bias),
#undef STRUCTURE
#define STRUCTURE Step
    sizeof(Step), AT(rows), AT(chunks), AT(sampled), AT(context), AT(chunk), AT(tables), AT(slots), AT(cosine),
        AT(sine), AT(lora), AT(active), AT(sampled_rows), AT(logits), AT(seconds), AT(read), AT(hidden_rows),
        AT(hidden),
#undef STRUCTURE
#define STRUCTURE Workspace
    sizeof(Workspace), AT(x), AT(normed), AT(wide), AT(q), AT(mixed), AT(act), AT(added), AT(attended), AT(h), AT(packed),
        AT(totals), AT(scores),
#undef STRUCTURE
};
const int64_t layout_length = sizeof(layout) / sizeof(*layout);
