/* The router of one layer for one token: logits, the experts that they choose, and their weights.
 *
 * What moves: the router's weight, once. No function keeps a pointer after it returned.
 */
#include <math.h>
#include <string.h>

#include "half.h"
#include "offmoe.h"

static void store(float x, int is_float, void *to, int i) {
    if (is_float)
        ((float *)to)[i] = x;
    else
        ((uint16_t *)to)[i] = bf16_of(x);
}

/* Move the first of the largest of x[first .. count) to x[first], with its number. */
static void bring_largest(float *x, int64_t *ids, int first, int count) {
    int best = first;
    for (int i = first + 1; i < count; i++)
        if (x[i] > x[best]) best = i;
    const float largest = x[best];
    const int64_t id = ids[best];
    memmove(x + first + 1, x + first, (size_t)(best - first) * sizeof *x);
    memmove(ids + first + 1, ids + first, (size_t)(best - first) * sizeof *ids);
    x[first] = largest, ids[first] = id;
}

/* Experts outside the best groups, by the sum of their two best, get -inf. */
static void leave_groups(const struct router *r, float *choice) {
    const int size = r->experts / r->groups;
    float best[MAX_GROUPS];
    int64_t ids[MAX_GROUPS];
    for (int g = 0; g < r->groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int i = g * size; i < (g + 1) * size; i++)
            if (choice[i] > first)
                second = first, first = choice[i];
            else if (choice[i] > second)
                second = choice[i];
        best[g] = first + second, ids[g] = g;
    }
    for (int i = 0; i < r->kept_groups; i++) bring_largest(best, ids, i, r->groups);
    for (int i = r->kept_groups; i < r->groups; i++)
        for (int e = 0; e < size; e++) choice[ids[i] * size + e] = -INFINITY;
}

/* logits bf16 or float [experts], scores bf16 or float [top_k] and ids [top_k] of x bf16 [cols]; the best first, of equal
 * ones the lowest. work: float [cols + 3 experts, experts as a multiple of 16], then int64 [experts]; 0, or 2 if memory ran
 * out. The caller has checked shapes. */
EXPORT int offmoe_route(struct pool *pool, const struct kernels *k, const struct router *r, int precision, const uint16_t *x,
                        float *work, int64_t *all, void *logits, void *scores, int64_t *ids) {
    const int n = r->experts, rows = r->weight->rows;
    float *in = work, *found = in + r->weight->cols, *choice = found + rows, *weights = choice + rows, total = 0;
    for (int i = 0; i < r->weight->cols; i++) in[i] = of_bf16(x[i]);
    const int failed = linears(pool, k, &r->weight, 1, precision, in, 1, &found);
    if (failed) return failed;
    float largest = -INFINITY;
    for (int i = 0; i < n; i++) {
        if (r->rounds) found[i] = of_bf16(bf16_of(found[i]));
        store(found[i], r->logits_float, logits, i);
        if (found[i] > largest) largest = found[i];
        all[i] = i;
    }
    for (int i = 0; i < n; i++) {
        weights[i] = r->sigmoid ? 1 / (1 + expf(-found[i])) : expf(found[i] - largest);
        total += weights[i];
        choice[i] = !r->sigmoid ? found[i] : r->correction ? weights[i] + r->correction[i] : weights[i];
    }
    if (r->groups > 1 && r->kept_groups < r->groups) leave_groups(r, choice);
    for (int i = 0; i < r->top_k; i++) bring_largest(choice, all, i, n);
    if (r->normalize) {
        total = r->sigmoid ? 1e-20f : 0;
        for (int i = 0; i < r->top_k; i++) total += weights[all[i]];
    } else if (r->sigmoid) {
        total = 1;
    }
    for (int i = 0; i < r->top_k; i++) {
        ids[i] = all[i];
        store(weights[ids[i]] / total * r->scale, r->scores_float, scores, i);
    }
    return 0;
}
