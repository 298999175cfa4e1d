/* What the files of this library share: weights, activations, and the table of functions of one instruction set.
 *
 * A weight is 16-row tiles of 32-bit words (offmoe/quant/packed_weight.py), or rows of bf16. Activations are float32
 * [tokens][cols] and are rewritten once per call into blocks of 1, 2, 4 or 8 tokens, in the order that kernels read them;
 * a block may be padded with zero tokens. Kernels compute 16 rows times one block, so that a weight word is read once
 * for all tokens of the block. Weights of bf16 have a way of their own for many tokens (multiply.c).
 */
#ifndef OFFMOE_H
#define OFFMOE_H

#include <stddef.h>
#include <stdint.h>

#define UNROLL _Pragma("GCC unroll 8")
#define EXPORT __attribute__((visibility("default")))

enum { TILE = 16, MAX_BLOCK = 8, MAX_TOKENS = 64 };
enum { MULTIPLIED = 6, MAX_MULTIPLIED = 128 }; /* tokens at once, and in a call, of multiply.c */

enum kind {
    KIND_INT4, KIND_MXFP4, KIND_INT8, KIND_FP8, KIND_BF16,
    KIND_INT5, KIND_INT6, /* nibbles, and what exceeds them in a plane of its own */
    KIND_INT2,            /* pairs of bits; the scale and the minimum of a group are the halves of a byte */
    KIND_INT3,            /* pairs, and third bits in a plane of their own */
    KIND_INT8_GROUPS,     /* int8 with a scale per group */
    KIND_IQ4,             /* nibbles that look up 16 levels of int8 */
    KINDS
};
enum scale_type { SCALE_BF16, SCALE_FP16, SCALE_FP32, SCALE_E8M0, SCALE_TWO_LEVELS };
enum precision { ACTIVATIONS_INT8, ACTIVATIONS_FLOAT };
enum glu { GLU_SILU, GLU_GELU_TANH, GLU_CLAMPED };

/* One weight [rows][cols]. group: columns per scale, and per scale of int8 activations; int8 weights have one scale per
 * row, and group says how activations are cut. scales: [rows / 16][cols / group][16], int8: [rows / 16][1][16]. zeros:
 * uint8 of the scales' shape, or null for 8 (int3: 4, int5: 16, int6: 32). bias: float32 [rows] or null.
 * minima: of the scales' shape and type, subtracted from code * scale, or null; not with zeros, of int4 and int5 only.
 * high: [rows / 16][words][16], the bits of a group's codes above their nibbles: byte b of a word has, from its lowest
 * bits on, those of inputs 2b, 2b + 1, 8 + 2b, 8 + 2b + 1 and so on; int3 and int5 have a word per 32 inputs, int6 per 16.
 * The words of int2 and int3 have one per 16 inputs, of pairs in that order.
 * supers: float16 [rows / 16][cols / 256][1, or 2 with minima][16], which int8 scales and minima are multiples of
 * (SCALE_TWO_LEVELS), in groups of 32; of int2, int3 and int6 in groups of 16. Mirrored in offmoe/compute/kernels/library.py. */
struct weight {
    const uint8_t *words;
    const void *scales;
    const uint8_t *zeros;
    const float *bias;
    const void *minima;
    const uint8_t *high;
    const uint16_t *supers;
    int32_t rows, cols, group, kind, scale_type;
};

/* One expert: gate and up [inner][hidden] of one format, down [hidden][inner], and the function between them (enum glu).
 * Mirrored in offmoe/compute/kernels/library.py. */
struct expert {
    struct weight gate, up, down;
    int32_t glu;
    float limit, alpha;
};

/* Activations of `tokens` tokens (1, 2, 4 or 8), in the order of the kernel of `precision` and kind; or, of any number, data
 * as lay_out writes it, and nothing else:
 *   int8, weights in nibbles      data int32 [cols / 8][tokens][2]: inputs 0 2 4 6 and 1 3 5 7 of a word
 *   int8, int8 weights            data int32 [cols / 4][tokens]
 *   float, or fp8 weights         data float [cols][tokens], in units that the variant's vectors name
 *   float, bf16 weights           data float [cols / 32][tokens][2][16]: even inputs, odd inputs
 * scale: float [cols / group][tokens]; sum: of that shape, what the sum s of a group's (quantized) inputs gives. float: s.
 * int8: int32, -s times what is subtracted from every code; float -s for zeros, and float -s scale for minima. */
struct block {
    int32_t tokens;
    void *data;
    float *scale;
    void *sum;
};

/* y: float [block tokens][16], the rows of one tile. A pair computes two tiles of equal format, sharing activations. */
typedef void tile_function(const struct weight *w, int tile, const struct block *x, float *y);
typedef void pair_function(const struct weight *const *w, const int *tile, const struct block *x, float *const *y);

/* Float weights [rows][cols] of weight_type that become words row by row, scales [rows][cols / group] of scale_type and,
 * unless null, zeros of that shape. factors [16]: scales that are tried, `candidates` of them, relative to the first that comes to mind; refits:
 * rounds of fitting the best one by least squares. Mirrored in offmoe/compute/kernels/library.py. */
struct encoding {
    const void *weight;
    uint8_t *words;
    void *scales;
    uint8_t *zeros;
    const float *factors;
    int32_t rows, cols, group, bits, weight_type, scale_type, candidates, refits;
};

/* Encode a row, with memory for `cols` floats; 1 if it holds what is not finite. */
typedef int encode_function(const struct encoding *e, int row, float *memory);
encode_function encode_portable, encode_avx2, encode_avx512;

/* A weight of that kind and the tensors it became, as they stand in compressed-tensors' files: codes with 2^(bits - 1)
 * added, zeros [rows / 8][cols / group] words along a column or null. out: float [rows][4], the largest |error| of a row,
 * the sums of |error|, of error^2 and of value^2, once decoded in the dtype of the scales. */
struct encoded {
    const void *weight;
    const uint8_t *words;
    const void *scales;
    const uint32_t *zeros;
    float *out;
    int32_t rows, cols, group, bits, weight_type, scale_type;
};
typedef void compare_function(const struct encoded *e, int row);
compare_function compare_portable, compare_avx2, compare_avx512;

/* `count` GGUF blocks of a type (a number of enum ggml_type) and their size, that become bf16 or float32 (out_type).
 * streams: whether bf16 is written past the caches, which pays where the output exceeds them. Mirrored in offmoe/compute/kernels/library.py. */
struct decoding {
    const uint8_t *blocks;
    void *out;
    int32_t count, block_bytes, type, out_type, streams;
};
/* A GGUF matrix of `rows` times `blocks_per_row` blocks that becomes tiles of words, scales and further planes, as
 * `struct weight` has them; rows are a multiple of 16. Mirrored in offmoe/compute/kernels/library.py. */
struct retiling {
    const uint8_t *blocks;
    uint32_t *words;
    void *scales;
    void *minima;
    uint32_t *high;
    uint16_t *supers;
    int32_t rows, blocks_per_row, type;
};

/* `count` rows, a multiple of 16, of `width` entries, `stride` bytes apart, that become tiles. Words of four bytes are
 * xored with `flip`. Mirrored in offmoe/compute/kernels/library.py. */
struct tiling {
    const uint8_t *rows;
    uint8_t *tiles;
    size_t stride;
    int32_t count, width, entry_bytes;
    uint32_t flip;
};
void offmoe_retile(const struct retiling *r);
void offmoe_tile(const struct tiling *t);

/* A step of putting an expert into a slot: `blocks` if it has them, else `rows`. Addresses in them are offsets: of what is
 * put, from the start of stored tensor `tensor`; of where it is put, from the start of the slot. Mirrored in
 * offmoe/compute/kernels/library.py. */
struct placing {
    struct retiling blocks;
    struct tiling rows;
    int32_t tensor, has_blocks;
};

typedef void decode_function(const struct decoding *d, int first, int last);
decode_function decode_portable, decode_avx2, decode_avx512, decode_avx512bf16;

/* RMS norms of rows: out = w x / sqrt(mean(x^2) + eps), as families of transformers round it; out may be x. Rows are
 * multiples of 16. */
enum norm {
    NORM_ROUNDS_TWICE, /* x / rms to bf16, then times w */
    NORM_ROUNDS_ONCE,
    NORM_OF_ONE_MORE, /* times 1 + w, rounded once */
};
typedef void norm_function(const uint16_t *x, const uint16_t *w, int rows, int width, float eps, int norm, uint16_t *out);

/* Rotate a head by its position: x float [>= rotary], cos and sin float [rotary]; number i goes with number rotary / 2 + i. */
typedef void rotate_function(float *x, const float *cos, const float *sin, int rotary);

/* One token's heads among `count` keys and values that they share, at most CHUNK of them: q float [heads][width], each 32
 * numbers in two halves, the even ones and the odd ones; keys and values bf16 [count][width]. scores: memory for
 * [heads][CHUNK]. partial [heads][width + 2]: values weighted with exp(score - top), in the order of q; the sum of these
 * weights; top. */
enum { CHUNK = 256 };
typedef void attend_function(const float *q, int heads, int width, const uint16_t *keys, const uint16_t *values, int count,
                             float scale, float *scores, float *partial);

/* Columns of 16 rows of bf16, `stride` bytes apart, as out float [count][16]; count is a multiple of 16. */
typedef void columns_function(const uint8_t *rows, size_t stride, int count, float *out);
/* sums float [tokens][16] += x [tokens][count] columns, for 1 to MULTIPLIED tokens, x as float [count][tokens]. */
typedef void multiply_function(const float *columns, int count, const float *x, int tokens, float *sums);

struct kernels {
    const char *name;
    int max_block;   /* tokens */
    int many_tokens; /* from so many on, weights of bf16 are multiplied by multiply.c; 0: never */
    tile_function *tile[KINDS][2][4]; /* [kind][precision][log2 block] */
    pair_function *pair[KINDS][2][4];
    /* Write columns [start, start + count) of a block from x [valid][stride]; whole groups; missing tokens are zero. */
    void (*pack)(const struct weight *w, int precision, const float *x, size_t stride, int valid, int start, int count,
                 struct block *out);
    /* gate[i] = glu(gate[i], up[i]) */
    void (*activate)(int glu, float limit, float alpha, float *gate, const float *up, size_t count);
    /* Read memory as fast as loads go; the result only keeps the compiler from leaving it out. */
    uint64_t (*read)(const uint8_t *p, size_t nbytes);
    encode_function *encode;
    compare_function *compare;
    decode_function *decode;
    norm_function *norm;
    rotate_function *rotate;
    attend_function *attend;
    columns_function *columns;
    multiply_function *multiply;
};

/* The attention of a layer for one new token (attention.c): projections of one input, heads of `width` numbers, of which
 * the first `rotary` are rotated, and RMS norms of heads (bf16 [width]) or null. Heads that share a key are neighbors.
 * Mirrored in offmoe/compute/kernels/library.py. */
struct attention {
    const struct weight *q, *k, *v, *out;
    const uint16_t *q_norm, *k_norm;
    int32_t width, rotary, norm; /* enum norm, of both */
    float eps, scale;
};

/* The router of a layer for one new token (route.c): a weight whose rows beyond `experts` count for nothing; logits are
 * rounded to bf16 (rounds) or not. Weights of experts are exp(logit), or sigmoid(logit), by which experts are chosen after
 * float correction [experts] or null was added, among the best of `groups`. They are divided by the sum over the chosen
 * experts (normalize), else over all for exp(logit). Mirrored in offmoe/compute/kernels/library.py. */
enum { MAX_GROUPS = 64 };
struct router {
    const struct weight *weight;
    const float *correction;
    int32_t experts, top_k, sigmoid, rounds, normalize, groups, kept_groups, logits_float, scores_float;
    float scale;
};

/* A decoder layer for one new token (layers.c): RMS norms (bf16 [hidden]) before attention and before the experts, and how
 * they round. router: null where the caller computes what follows the second norm. experts [router->experts]: null where
 * one cannot be computed now. predicts: negative, or the next layer's second norm and router are asked before the
 * experts, and bit i says whether the layer is left if the i-th best of the next one's experts is not there.
 * Mirrored in offmoe/compute/kernels/library.py. */
struct layer {
    const struct attention *attention;
    const struct router *router;
    const struct expert *const *experts;
    const uint16_t *norms[2];
    int32_t kinds[2], hidden, predicts;
    float eps[2];
};

/* Where a layer keeps the keys and values of `tokens` tokens, the new one included: [groups][tokens][width], with steps
 * from group to group. Mirrored in offmoe/compute/kernels/library.py. */
struct states {
    uint16_t *keys, *values;
    size_t key_step, value_step;
    int32_t tokens;
};

/* A token's way through layers: its hidden state x bf16 [hidden], cos and sin bf16 [rotary], memory; per layer its output
 * bf16 [hidden], and of its experts ids and scores (bf16 or float) in rows of `most` numbers of 64 and 32 bits; and the
 * ids that are predicted for the layer behind it. normed, done, misses: see offmoe_layers.
 * Mirrored in offmoe/compute/kernels/library.py. */
struct passage {
    const uint16_t *x, *cos, *sin;
    uint8_t *memory;
    uint16_t *outs, *normed;
    int64_t *ids, *predicted;
    float *scores;
    int32_t most, done, misses;
};

extern const struct kernels kernels_portable;
#if defined(__x86_64__) || defined(_M_X64)
extern const struct kernels kernels_avx2, kernels_avxvnni, kernels_vnni256, kernels_avx512vnni;
#endif

/* The variant's decoders, or those for AVX512-BF16 where the processor has it and the variant is the fastest. */
decode_function *decoder_of(const struct kernels *k);

/* The pool (pool.c): tasks 0 .. first - 1, then, when all of them are done, the tasks up to total. */
struct pool;
typedef void task_function(void *job, int task, int worker);
void pool_run(struct pool *pool, task_function *run, void *job, int first, int total);
int pool_threads(const struct pool *pool);
void *pool_scratch(struct pool *pool, size_t nbytes); /* valid until the next call; null if memory ran out */
void pool_lock(struct pool *pool);
void pool_unlock(struct pool *pool);

/* A weight of bf16 on many tokens, by its parts (multiply.c). Inputs are float [cols] of each token in an order of their own:
 * written from x [tokens][stride], which begins with the columns [start, start + count). sums: memory for product_floats,
 * of which the first are the products and the bias, float [tiles][tokens][16], of the tiles from `first` on. */
void lay_out(int cols, int tokens, const float *x, size_t stride, int start, int count, float *inputs);
size_t product_floats(int tiles, int tokens);
void product_of_tiles(const struct kernels *k, const struct weight *w, int first, int tiles, const float *inputs, int tokens,
                      float *sums);

/* What layers.c calls of the functions that Python calls; see the files that have them. */
int offmoe_experts(struct pool *pool, const struct kernels *k, const struct expert *const *experts, const int32_t *rows,
                   int count, int precision, const float *x, float *out);
size_t offmoe_attention_floats(const struct attention *a);
int offmoe_heads(struct pool *pool, const struct kernels *k, const struct attention *a, int precision, const uint16_t *x,
                 const uint16_t *cos, const uint16_t *sin, float *work, uint16_t *key, uint16_t *value);
int offmoe_attend(struct pool *pool, const struct kernels *k, const struct attention *a, int precision,
                  const uint16_t *keys, const uint16_t *values, int tokens, size_t key_step, size_t value_step, float *work,
                  uint16_t *out);
int offmoe_route(struct pool *pool, const struct kernels *k, const struct router *r, int precision, const uint16_t *x,
                 float *work, int64_t *all, void *logits, void *scores, int64_t *ids);

/* out[i] float [tokens][w[i]->rows] = x w[i]^T + bias of several weights on one input x float [tokens][cols], in one call.
 * Returns as offmoe_experts (expert.c). */
int linears(struct pool *pool, const struct kernels *k, const struct weight *const *w, int count, int precision,
            const float *x, int tokens, float *const *out);

#endif
