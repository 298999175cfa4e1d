/* A bf16 weight on many tokens.
 *
 * What moves: every byte of the weight once per call. The kernels of few tokens (tiles.h) read a weight's row and a
 * token's row side by side, two numbers for a product, which is as fast as memory gives a weight. With many tokens the
 * caches cannot give as much as the arithmetic takes, so here a vector of weights is multiplied with single numbers of six
 * tokens, all sums in registers. Weights are turned into columns of floats for that, and tokens are cut into sixes, once.
 */
#include <string.h>

#include "half.h"
#include "offmoe.h"

enum {
    DEPTH = 256,   /* columns at once: 16 KB of floats, half of a first cache */
    TASK_TILES = 4 /* of 16 rows; their sums for MAX_MULTIPLIED tokens are 32 KB */
};

static int least(int a, int b) { return a < b ? a : b; }
static int parts(int n, int size) { return (n + size - 1) / size; }

/* Inputs are float [cols / DEPTH][sixes][DEPTH][6]; the last part of either kind may be shorter. */
static float *inputs_at(float *inputs, int cols, int tokens, int column, int six) {
    const int from = column / DEPTH * DEPTH, first = six * MULTIPLIED;
    return inputs + (size_t)from * tokens + (size_t)first * least(DEPTH, cols - from) +
           (size_t)(column - from) * least(MULTIPLIED, tokens - first);
}

static void lay_out_six(int cols, int tokens, int six, const float *x, size_t stride, int start, int count, float *inputs) {
    const int n = least(MULTIPLIED, tokens - six * MULTIPLIED), end = start + count;
    for (int from = start, until; from < end; x += until - from, from = until) {
        float *to = inputs_at(inputs, cols, tokens, from, six);
        until = least(end, (from / DEPTH + 1) * DEPTH);
        for (int m = 0; m < n; m++)
            for (int i = 0; i < until - from; i++) to[i * n + m] = x[m * stride + i];
    }
}

void lay_out(int cols, int tokens, const float *x, size_t stride, int start, int count, float *inputs) {
    for (int six = 0; six < parts(tokens, MULTIPLIED); six++)
        lay_out_six(cols, tokens, six, x + six * MULTIPLIED * stride, stride, start, count, inputs);
}

size_t product_floats(int tiles, int tokens) { return (size_t)tiles * tokens * TILE + DEPTH * TILE; }

void product_of_tiles(const struct kernels *k, const struct weight *w, int first, int tiles, const float *inputs, int tokens,
                      float *sums) {
    const int cols = w->cols, sixes = parts(tokens, MULTIPLIED);
    const size_t stride = (size_t)cols * 2, sums_of_tile = (size_t)tokens * TILE;
    const uint8_t *rows = w->words + first * TILE * stride;
    float *columns = sums + tiles * sums_of_tile;
    memset(sums, 0, tiles * sums_of_tile * sizeof *sums);
    for (int from = 0; from < cols; from += DEPTH) {
        const int count = least(DEPTH, cols - from);
        for (int tile = 0; tile < tiles; tile++) {
            const int is_last = tile + 1 == tiles, next_from = from + (is_last ? DEPTH : 0);
            const uint8_t *next = rows + (is_last ? 0 : tile + 1) * TILE * stride + (size_t)next_from * 2;
            int row = next_from < cols ? 0 : TILE; /* of the next columns, whose rows are asked for */
            k->columns(rows + tile * TILE * stride + (size_t)from * 2, stride, count, columns);
            for (int six = 0; six < sixes; six++) {
                for (const int end = least(TILE, row + parts(TILE, sixes)); row < end; row++)
                    for (int at = 0; at < DEPTH * 2; at += 64) __builtin_prefetch(next + row * stride + at, 0, 2);
                k->multiply(columns, count, inputs_at((float *)inputs, cols, tokens, from, six),
                            least(MULTIPLIED, tokens - six * MULTIPLIED),
                            sums + tile * sums_of_tile + (size_t)six * MULTIPLIED * TILE);
            }
        }
    }
    for (int tile = 0; w->bias && tile < tiles; tile++)
        for (int m = 0; m < tokens; m++)
            for (int r = 0; r < TILE; r++) sums[tile * sums_of_tile + m * TILE + r] += w->bias[(first + tile) * TILE + r];
}

struct product {
    const struct kernels *k;
    const struct weight *w;
    const uint16_t *x;
    uint16_t *out;
    int tokens, sixes, tiles;
    float *inputs, *workers; /* and memory of each thread */
};

static void lay_out_bf16(const struct product *p, int six) {
    const int first = six * MULTIPLIED, n = least(MULTIPLIED, p->tokens - first), cols = p->w->cols;
    float x[MULTIPLIED * DEPTH];
    for (int from = 0; from < cols; from += DEPTH) {
        const int count = least(DEPTH, cols - from);
        for (int m = 0; m < n; m++)
            for (int i = 0; i < count; i++) x[m * DEPTH + i] = of_bf16(p->x[(size_t)(first + m) * cols + from + i]);
        lay_out_six(cols, p->tokens, six, x, DEPTH, from, count, p->inputs);
    }
}

static void multiply_rows(const struct product *p, int task, int worker) {
    const int first = task * TASK_TILES, tiles = least(TASK_TILES, p->tiles - first);
    float *sums = p->workers + worker * product_floats(TASK_TILES, p->tokens);
    product_of_tiles(p->k, p->w, first, tiles, p->inputs, p->tokens, sums);
    for (int m = 0; m < p->tokens; m++)
        for (int tile = 0; tile < tiles; tile++) {
            const float *of = sums + ((size_t)tile * p->tokens + m) * TILE;
            uint16_t *to = p->out + (size_t)m * p->w->rows + (first + tile) * TILE;
            for (int r = 0; r < TILE; r++) to[r] = bf16_of(of[r]);
        }
}

static void run_task(void *job, int task, int worker) {
    const struct product *p = job;
    if (task < p->sixes)
        lay_out_bf16(p, task);
    else
        multiply_rows(p, task - p->sixes, worker);
}

/* out bf16 [tokens][rows] = x w^T + bias of x bf16 [tokens][cols], for a weight of bf16. 0, or as offmoe_experts: 1 for
 * numbers of tokens outside 1 .. MAX_MULTIPLIED, 2 if memory ran out. */
EXPORT int offmoe_multiply(struct pool *pool, const struct kernels *k, const struct weight *w, const uint16_t *x, int tokens,
                           uint16_t *out) {
    struct product p = {k, w, x, out, tokens, parts(tokens, MULTIPLIED), w->rows / TILE, NULL, NULL};
    if (tokens < 1 || tokens > MAX_MULTIPLIED) return 1;
    pool_lock(pool);
    const size_t inputs = ((size_t)w->cols * tokens + 15) / 16 * 16, of_worker = product_floats(TASK_TILES, tokens);
    p.inputs = pool_scratch(pool, (inputs + of_worker * pool_threads(pool)) * sizeof(float));
    if (p.inputs) {
        p.workers = p.inputs + inputs;
        pool_run(pool, run_task, &p, p.sixes, p.sixes + parts(p.tiles, TASK_TILES));
    }
    pool_unlock(pool);
    return p.inputs ? 0 : 2;
}
