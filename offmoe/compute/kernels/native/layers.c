/* Decoder layers for one new token, one after the other: the caller is asked again only where it has something to do.
 *
 * What moves: what the functions of attention.c, route.c and expert.c move, which compute the parts. What stands between
 * them is rounded to bf16 where torch rounds it, so a token has the bits that the parts give one by one. No function keeps
 * a pointer after it returned.
 */
#include <string.h>

#include "half.h"
#include "offmoe.h"

/* What the layers of a call compute with, one after the other. */
struct space {
    float *attention, *router, *in, *rows, *scores, *logits;
    int64_t *all;
    const struct expert **experts;
    uint16_t *normed, *foreseen, *attended, *key, *value;
};

static void *piece(uint8_t *base, size_t *at, size_t bytes) {
    void *p = base ? base + *at : NULL;
    *at += (bytes + 63) / 64 * 64;
    return p;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

/* Cut memory into what `count` layers need; gives its bytes. Without a base only these are asked for. */
static size_t cut(const struct layer *layers, int count, uint8_t *base, struct space *s) {
    size_t attention = 0, router = 0, experts = 0, kept = 0, hidden = 0, keys = 0, at = 0;
    for (const struct layer *l = layers; l < layers + count; l++) {
        attention = larger(attention, offmoe_attention_floats(l->attention));
        hidden = larger(hidden, (size_t)l->hidden);
        keys = larger(keys, (size_t)l->attention->k->rows);
        if (!l->router) continue;
        router = larger(router, (size_t)l->hidden + 3 * (size_t)l->router->weight->rows);
        experts = larger(experts, (size_t)l->router->experts);
        kept = larger(kept, (size_t)l->router->top_k);
    }
    s->attention = piece(base, &at, attention * sizeof(float));
    s->router = piece(base, &at, router * sizeof(float));
    s->in = piece(base, &at, hidden * sizeof(float));
    s->rows = piece(base, &at, kept * hidden * sizeof(float));
    s->scores = piece(base, &at, kept * sizeof(float));
    s->logits = piece(base, &at, experts * sizeof(float));
    s->all = piece(base, &at, experts * sizeof(int64_t));
    s->experts = piece(base, &at, kept * sizeof(struct expert *));
    s->normed = piece(base, &at, hidden * sizeof(uint16_t));
    s->foreseen = piece(base, &at, hidden * sizeof(uint16_t));
    s->attended = piece(base, &at, hidden * sizeof(uint16_t));
    s->key = piece(base, &at, keys * sizeof(uint16_t));
    s->value = piece(base, &at, keys * sizeof(uint16_t));
    return at;
}

/* Bytes of `struct passage`'s memory for these layers. */
EXPORT size_t offmoe_layers_bytes(const struct layer *layers, int count) {
    struct space s;
    return cut(layers, count, NULL, &s);
}

/* out = x + attention(norm(x)). */
static int attend(struct pool *pool, const struct kernels *k, const struct layer *l, const struct states *at, int precision,
                  const struct passage *p, struct space *s, const uint16_t *x, uint16_t *out) {
    const struct attention *a = l->attention;
    const size_t width = (size_t)a->width, bytes = width * sizeof(uint16_t);
    const size_t row = (size_t)(at->tokens - 1) * width;
    k->norm(x, l->norms[0], 1, l->hidden, l->eps[0], l->kinds[0], s->normed);
    int failed = offmoe_heads(pool, k, a, precision, s->normed, p->cos, p->sin, s->attention, s->key, s->value);
    if (failed) return failed;
    for (size_t g = 0; g < (size_t)a->k->rows / width; g++) {
        memcpy(at->keys + g * at->key_step + row, s->key + g * width, bytes);
        memcpy(at->values + g * at->value_step + row, s->value + g * width, bytes);
    }
    failed = offmoe_attend(pool, k, a, precision, at->keys, at->values, at->tokens, at->key_step, at->value_step,
                           s->attention, s->attended);
    if (failed) return failed;
    for (int i = 0; i < l->hidden; i++) out[i] = bf16_of(of_bf16(x[i]) + of_bf16(s->attended[i]));
    return 0;
}

/* out += the rows of experts, weighted and summed as `combine` of torch_ffn.py does: products have the dtype of the
 * scores, sums are float32, row by row, and rounded once. */
static void combine(const struct layer *l, const float *rows, const float *scores, float *sum, uint16_t *out) {
    const int hidden = l->hidden, rounds = !l->router->scores_float;
    for (int i = 0; i < hidden; i++) sum[i] = 0;
    for (int r = 0; r < l->router->top_k; r++) {
        const float score = scores[r], *row = rows + (size_t)r * hidden;
        if (rounds)
            for (int i = 0; i < hidden; i++) sum[i] += of_bf16(bf16_of(of_bf16(bf16_of(row[i])) * score));
        else
            for (int i = 0; i < hidden; i++) sum[i] += of_bf16(bf16_of(row[i])) * score;
    }
    for (int i = 0; i < hidden; i++) out[i] = bf16_of(of_bf16(out[i]) + of_bf16(bf16_of(sum[i])));
}

/* Whether one of the experts `ids` that `matter` names, bit i for the i-th, is not there. */
static int misses(const struct layer *l, const int64_t *ids, int matter) {
    for (int i = 0; i < l->router->top_k; i++)
        if (matter >> i & 1 && !l->experts[ids[i]]) return 1;
    return 0;
}

/* The experts that a layer would choose for x, the sum of the layer before it and that one's attention. A residual changes
 * little from layer to layer, so it will mostly choose them. */
static int foresee(struct pool *pool, const struct kernels *k, const struct layer *l, int precision, struct space *s,
                   const uint16_t *x, int64_t *ids) {
    k->norm(x, l->norms[1], 1, l->hidden, l->eps[1], l->kinds[1], s->foreseen);
    return offmoe_route(pool, k, l->router, precision, s->foreseen, s->router, s->all, s->logits, s->scores, ids);
}

/* The experts that a token chooses in layer p->done, added to `out`. 1 if they are only chosen, see offmoe_layers. */
static int experts(struct pool *pool, const struct kernels *k, const struct layer *l, const struct layer *next,
                   int precision, struct space *s, struct passage *p, uint16_t *out) {
    const struct router *r = l->router;
    const size_t row = (size_t)p->done * p->most;
    int64_t *ids = p->ids + row, *predicted = p->predicted + row;
    void *scores = p->scores + row;
    int failed = offmoe_route(pool, k, r, precision, s->normed, s->router, s->all, s->logits, scores, ids);
    if (failed) return failed;
    p->misses = misses(l, ids, -1);
    if (l->predicts > 0 && !(next && next->router)) return 1;
    if (l->predicts >= 0 && next && next->router) {
        failed = foresee(pool, k, next, precision, s, out, predicted);
        if (failed) return failed;
        p->misses |= misses(next, predicted, l->predicts);
    }
    if (p->misses) return 1;
    for (int i = 0; i < r->top_k; i++) s->experts[i] = l->experts[ids[i]];
    for (int i = 0; i < l->hidden; i++) s->in[i] = of_bf16(s->normed[i]);
    for (int i = 0; i < r->top_k; i++)
        s->scores[i] = r->scores_float ? ((float *)scores)[i] : of_bf16(((uint16_t *)scores)[i]);
    failed = offmoe_experts(pool, k, s->experts, NULL, r->top_k, precision, s->in, s->rows);
    if (!failed) combine(l, s->rows, s->scores, s->in, out);
    return failed;
}

/* Layers 0 .. count - 1 of one token. The first that is not complete has in its row of `outs` the sum of its input and its
 * attention, and `normed` holds the norm of that. Its router is null; or an expert that it chose or predicts is, which
 * `misses` says; or one that it predicted would matter, and there is no router behind it. Keys and values of all layers up
 * to it stand in `states`. 0, or 2 if memory ran out. The caller has checked shapes. */
EXPORT int offmoe_layers(struct pool *pool, const struct kernels *k, const struct layer *layers, const struct states *states,
                         int count, int precision, struct passage *p) {
    struct space s;
    const uint16_t *x = p->x;
    cut(layers, count, p->memory, &s);
    p->misses = 0;
    for (p->done = 0; p->done < count; p->done++) {
        const struct layer *l = layers + p->done;
        uint16_t *out = p->outs + (size_t)p->done * l->hidden;
        const struct layer *next = p->done + 1 < count ? l + 1 : NULL;
        int failed = attend(pool, k, l, states + p->done, precision, p, &s, x, out);
        if (failed) return failed;
        k->norm(out, l->norms[1], 1, l->hidden, l->eps[1], l->kinds[1], s.normed);
        failed = l->router ? experts(pool, k, l, next, precision, &s, p, out) : 1;
        if (failed == 1) {
            memcpy(p->normed, s.normed, (size_t)l->hidden * sizeof(uint16_t));
            return 0;
        }
        if (failed) return failed;
        x = out;
    }
    return 0;
}
