/* A bf16 weight on many tokens.
 *
 * What moves: every byte of the weight once per call. The kernels of few tokens (tiles.h) read a weight's row and a
 * token's row side by side, two numbers for a product, which is as fast as memory gives a weight. With many tokens the
 * caches cannot give as much as the arithmetic takes, so here a vector of weights is multiplied with single numbers of six
 * tokens, all sums in registers. Weights are turned into columns of floats for that, and tokens are cut into sixes, once.
 */
#include "half.h"
#include "offmoe.h"

enum {
    DEPTH = 256,   /* columns at once: 16 KB of floats, half of a first cache */
    TASK_TILES = 4 /* of 16 rows; their sums for MAX_MULTIPLIED tokens are 32 KB */
};

struct product {
    const struct kernels *k;
    const struct weight *w;
    const uint16_t *x;
    uint16_t *out;
    int tokens, sixes, tiles;
    float *inputs, *workers; /* [cols / DEPTH][sixes][DEPTH][6], and memory of each thread */
};

static int least(int a, int b) { return a < b ? a : b; }
static int parts(int n, int size) { return (n + size - 1) / size; }
static size_t worker_floats(const struct product *p) { return DEPTH * TILE + (size_t)TASK_TILES * p->tokens * TILE; }

/* What six tokens have from column `from` on. */
static float *inputs_at(const struct product *p, int from, int count, int six) {
    return p->inputs + (size_t)from * p->tokens + (size_t)six * MULTIPLIED * count;
}

static void lay_out(const struct product *p, int six) {
    const int first = six * MULTIPLIED, n = least(MULTIPLIED, p->tokens - first), cols = p->w->cols;
    for (int from = 0; from < cols; from += DEPTH) {
        const int count = least(DEPTH, cols - from);
        float *to = inputs_at(p, from, count, six);
        for (int m = 0; m < n; m++)
            for (int i = 0; i < count; i++) to[i * n + m] = of_bf16(p->x[(size_t)(first + m) * cols + from + i]);
    }
}

static void multiply_rows(const struct product *p, int task, int worker) {
    const int first = task * TASK_TILES, tiles = least(TASK_TILES, p->tiles - first), cols = p->w->cols;
    float *columns = p->workers + worker * worker_floats(p), *sums = columns + DEPTH * TILE;
    const size_t stride = (size_t)cols * 2, sums_of_tile = (size_t)p->tokens * TILE;
    const uint8_t *rows = p->w->words + first * TILE * stride;
    for (size_t i = 0; i < tiles * sums_of_tile; i++) sums[i] = 0;
    for (int from = 0; from < cols; from += DEPTH) {
        const int count = least(DEPTH, cols - from);
        for (int tile = 0; tile < tiles; tile++) {
            const int is_last = tile + 1 == tiles;
            const uint8_t *next = rows + (is_last ? 0 : (tile + 1) * TILE * stride) + (size_t)(from + (is_last ? DEPTH : 0)) * 2;
            int row = from + is_last * DEPTH < cols ? 0 : TILE; /* of the next columns, whose rows are asked for */
            p->k->columns(rows + tile * TILE * stride + (size_t)from * 2, stride, count, columns);
            for (int six = 0; six < p->sixes; six++) {
                for (const int end = least(TILE, row + parts(TILE, p->sixes)); row < end; row++)
                    for (int at = 0; at < DEPTH * 2; at += 64) __builtin_prefetch(next + row * stride + at, 0, 2);
                p->k->multiply(columns, count, inputs_at(p, from, count, six), least(MULTIPLIED, p->tokens - six * MULTIPLIED),
                               sums + tile * sums_of_tile + (size_t)six * MULTIPLIED * TILE);
            }
        }
    }
    for (int m = 0; m < p->tokens; m++)
        for (int tile = 0; tile < tiles; tile++) {
            const float *of = sums + tile * sums_of_tile + (size_t)m * TILE;
            const int row = (first + tile) * TILE;
            uint16_t *to = p->out + (size_t)m * p->w->rows + row;
            for (int r = 0; r < TILE; r++) to[r] = bf16_of(of[r] + (p->w->bias ? p->w->bias[row + r] : 0.0f));
        }
}

static void run_task(void *job, int task, int worker) {
    const struct product *p = job;
    if (task < p->sixes)
        lay_out(p, task);
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
    const size_t inputs = ((size_t)w->cols * tokens + 15) / 16 * 16;
    p.inputs = pool_scratch(pool, (inputs + worker_floats(&p) * pool_threads(pool)) * sizeof(float));
    if (p.inputs) {
        p.workers = p.inputs + inputs;
        pool_run(pool, run_task, &p, p.sixes, p.sixes + parts(p.tiles, TASK_TILES));
    }
    pool_unlock(pool);
    return p.inputs ? 0 : 2;
}
