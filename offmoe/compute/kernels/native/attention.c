/* The attention of one layer for one new token: projections of its input with norms and rotations, then the token among
 * all keys and values, and the output's projection.
 *
 * What moves: the weights, and all keys and values, once; divided among the threads. Between the two calls the caller puts
 * the new key and value behind the others.
 */
#include "half.h"
#include "offmoe.h"

enum { FEW_BYTES = 1 << 17 }; /* keys and values that one thread reads before others would be awake */

static void widen(const uint16_t *from, float *to, int count) {
    for (int i = 0; i < count; i++) to[i] = of_bf16(from[i]);
}

static void narrow(const float *from, uint16_t *to, int count) {
    for (int i = 0; i < count; i++) to[i] = bf16_of(from[i]);
}

/* Each 32 numbers: the even ones, then the odd ones, as words of two bf16 are read. */
static void split(const float *from, float *to, int count) {
    for (int i = 0; i < count; i += 2 * TILE)
        for (int j = 0; j < TILE; j++) to[i + j] = from[i + 2 * j], to[i + TILE + j] = from[i + 2 * j + 1];
}

/* Numbers of the input, of the output, or of the queries, whichever are most. */
static size_t widest(const struct attention *a) {
    const int most = a->q->cols > a->out->rows ? a->q->cols : a->out->rows;
    return (size_t)(most > a->q->rows ? most : a->q->rows);
}

/* Floats of the memory that both calls of a layer share. */
EXPORT size_t offmoe_attention_floats(const struct attention *a) {
    return widest(a) + (size_t)a->q->rows + (size_t)a->k->rows + (size_t)a->v->rows;
}

/* Heads of a projection: rounded to bf16, normalized, then rotated in float. memory: bf16 [rows]. */
static void turn(const struct kernels *k, const struct attention *a, const uint16_t *weight, const float *cos,
                 const float *sin, float *x, int rows, uint16_t *memory) {
    narrow(x, memory, rows);
    if (weight) k->norm(memory, weight, rows / a->width, a->width, a->eps, a->norm, memory);
    widen(memory, x, rows);
    for (int i = 0; i < rows; i += a->width) k->rotate(x + i, cos, sin, a->rotary);
}

/* Queries into `work`, the key and the value bf16 [groups][width]. x bf16 [q->cols]; cos and sin bf16 [rotary <= 1024].
 * 0, or 2 if memory ran out. The caller has checked shapes: width is a multiple of 32. */
EXPORT int offmoe_heads(struct pool *pool, const struct kernels *k, const struct attention *a, int precision,
                        const uint16_t *x, const uint16_t *cos, const uint16_t *sin, float *work, uint16_t *key,
                        uint16_t *value) {
    float *in = work, *q = in + widest(a), *kv[2] = {q + a->q->rows, q + a->q->rows + a->k->rows}, turns[2][1024];
    const struct weight *weights[3] = {a->q, a->k, a->v};
    float *const outs[3] = {q, kv[0], kv[1]};
    widen(x, in, a->q->cols);
    const int failed = linears(pool, k, weights, 3, precision, in, 1, outs);
    if (failed) return failed;
    widen(cos, turns[0], a->rotary);
    widen(sin, turns[1], a->rotary);
    turn(k, a, a->q_norm, turns[0], turns[1], q, a->q->rows, (uint16_t *)in);
    turn(k, a, a->k_norm, turns[0], turns[1], kv[0], a->k->rows, key);
    narrow(kv[0], key, a->k->rows);
    narrow(kv[1], value, a->v->rows);
    return 0;
}

struct attending {
    const struct kernels *k;
    const struct attention *a;
    const float *q;
    const uint16_t *keys, *values;
    size_t key_step, value_step; /* from group to group */
    int tokens, chunks, heads;   /* heads of a group */
    float *partial, *scores;
};

static void attend_task(void *job, int task, int worker) {
    const struct attending *j = job;
    const int width = j->a->width, group = task / j->chunks, first = task % j->chunks * CHUNK;
    const int count = j->tokens - first < CHUNK ? j->tokens - first : CHUNK;
    const uint16_t *keys = j->keys + group * j->key_step + (size_t)first * width;
    const uint16_t *values = j->values + group * j->value_step + (size_t)first * width;
    j->k->attend(j->q + (size_t)group * j->heads * width, j->heads, width, keys, values, count, j->a->scale,
                 j->scores + (size_t)worker * j->heads * CHUNK, j->partial + (size_t)task * j->heads * (width + 2));
}

/* The chunks of one head together: [width], in order. factors: memory for one number per chunk. */
static void join(const struct attending *j, int group, int head, float *factors, float *out) {
    const int width = j->a->width;
    const size_t step = (size_t)j->heads * (width + 2);
    const float *first = j->partial + (size_t)group * j->chunks * step + (size_t)head * (width + 2);
    float top = first[width + 1], total = 0;
    for (int c = 1; c < j->chunks; c++) top = first[c * step + width + 1] > top ? first[c * step + width + 1] : top;
    for (int c = 0; c < j->chunks; c++) {
        factors[c] = __builtin_expf(first[c * step + width + 1] - top);
        total += factors[c] * first[c * step + width];
    }
    for (int i = 0; i < width; i++) {
        const int place = i / 32 * 32 + i % 2 * TILE + i % 32 / 2;
        float sum = 0;
        for (int c = 0; c < j->chunks; c++) sum += factors[c] * first[c * step + place];
        out[i] = sum / total;
    }
}

/* The layer's output bf16 [out->rows], with what offmoe_heads left in `work`; keys and values bf16 [groups][tokens][width],
 * the new ones included, with key_step and value_step numbers from group to group. 0, or 2 if memory ran out. */
EXPORT int offmoe_attend(struct pool *pool, const struct kernels *k, const struct attention *a, int precision,
                         const uint16_t *keys, const uint16_t *values, int tokens, size_t key_step, size_t value_step,
                         float *work, uint16_t *out) {
    float *in = work, *q = in + widest(a);
    const int width = a->width, groups = a->k->rows / width, chunks = (tokens + CHUNK - 1) / CHUNK;
    struct attending j = {k, a, in, keys, values, key_step, value_step, tokens, chunks, a->q->rows / a->k->rows, NULL, NULL};
    const size_t partial = (size_t)groups * chunks * j.heads * (width + 2);
    const size_t scores = (size_t)pool_threads(pool) * j.heads * CHUNK;
    split(q, in, a->q->rows);
    pool_lock(pool);
    j.partial = pool_scratch(pool, (partial + scores + chunks) * sizeof(float));
    if (j.partial) {
        j.scores = j.partial + partial;
        if ((size_t)groups * tokens * width * 4 > FEW_BYTES)
            pool_run(pool, attend_task, &j, 0, groups * chunks);
        else
            for (int task = 0; task < groups * chunks; task++) attend_task(&j, task, 0);
        for (int h = 0; h < groups * j.heads; h++)
            join(&j, h / j.heads, h % j.heads, j.scores + scores, q + (size_t)h * width);
    }
    pool_unlock(pool);
    if (!j.partial) return 2;
    const int failed = linears(pool, k, &a->out, 1, precision, q, 1, &in);
    if (!failed) narrow(in, out, a->out->rows);
    return failed;
}

/* RMS norms of rows of bf16; see enum norm. */
EXPORT void offmoe_norm(const struct kernels *k, const uint16_t *x, const uint16_t *w, int rows, int width, float eps,
                        int norm, uint16_t *out) {
    k->norm(x, w, rows, width, eps, norm, out);
}
