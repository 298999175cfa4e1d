/* One expert on a few tokens, or one weight on them: what is called from Python.
 *
 * What moves: every byte of the expert once per call of up to 64 tokens. The first tasks each compute some rows of gate
 * and up for all tokens, activate them and lay them out for the second weight; the last tasks compute rows of down. No
 * function keeps a pointer after it returned.
 */
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "offmoe.h"

enum { TASK_BYTES = 1 << 18, GATE_ROWS = 64, MAX_BLOCKS = MAX_TOKENS };

struct job {
    const struct kernels *k;
    const struct weight *gate, *up, *down;
    int precision, glu, tokens, blocks, gate_rows, down_tiles;
    float limit, alpha;
    float *out, *scratch;
    size_t worker_floats;
    struct block x[MAX_BLOCKS], h[MAX_BLOCKS];
};

static int log2_of(int n) { return n == 1 ? 0 : n == 2 ? 1 : n == 4 ? 2 : 3; }
static int least(int a, int b) { return a < b ? a : b; }

/* Tokens of block b that are real; all blocks but the last are full. */
static int valid_tokens(const struct job *j, int b) { return least(j->k->max_block, j->tokens - b * j->k->max_block); }

static void gate_up_task(struct job *j, int task, int worker) {
    const int start = task * j->gate_rows, rows = least(j->gate_rows, j->up->rows - start), T = j->k->max_block;
    float *gate = j->scratch + worker * j->worker_floats, *up = gate + (size_t)j->gate_rows * j->tokens;
    float tile_y[2][TILE * MAX_BLOCK], *y[2] = {tile_y[0], tile_y[1]};
    const struct weight *both[2] = {j->gate, j->up};
    for (int tile = 0; tile < rows / TILE; tile++) {
        const int at = start / TILE + tile, tiles[2] = {at, at};
        for (int b = 0; b < j->blocks; b++) {
            j->k->pair[j->up->kind][j->precision][log2_of(j->x[b].tokens)](both, tiles, &j->x[b], y);
            for (int m = 0; m < valid_tokens(j, b); m++)
                for (int r = 0; r < TILE; r++) {
                    const size_t to = (size_t)(b * T + m) * rows + tile * TILE + r;
                    const int row = at * TILE + r;
                    gate[to] = y[0][m * TILE + r] + (j->gate->bias ? j->gate->bias[row] : 0.0f);
                    up[to] = y[1][m * TILE + r] + (j->up->bias ? j->up->bias[row] : 0.0f);
                }
        }
    }
    j->k->activate(j->glu, j->limit, j->alpha, gate, up, (size_t)rows * j->tokens);
    for (int b = 0; b < j->blocks; b++)
        j->k->pack(j->down, j->precision, gate + (size_t)b * T * rows, rows, valid_tokens(j, b), start, rows, &j->h[b]);
}

static void down_task(struct job *j, int task) {
    const int tiles = j->down->rows / TILE, start = task * j->down_tiles, end = least(start + j->down_tiles, tiles);
    const int T = j->k->max_block, kind = j->down->kind;
    float tile_y[2][TILE * MAX_BLOCK], *y[2] = {tile_y[0], tile_y[1]};
    const struct weight *both[2] = {j->down, j->down};
    for (int tile = start; tile < end; tile += 2) {
        const int pair = tile + 1 < end, two[2] = {tile, tile + 1};
        for (int b = 0; b < j->blocks; b++) {
            const int size = log2_of(j->h[b].tokens);
            if (pair)
                j->k->pair[kind][j->precision][size](both, two, &j->h[b], y);
            else
                j->k->tile[kind][j->precision][size](j->down, tile, &j->h[b], y[0]);
            for (int t = 0; t <= pair; t++)
                for (int m = 0; m < valid_tokens(j, b); m++)
                    for (int r = 0; r < TILE; r++) {
                        const int row = (tile + t) * TILE + r;
                        j->out[(size_t)(b * T + m) * j->down->rows + row] =
                            y[t][m * TILE + r] + (j->down->bias ? j->down->bias[row] : 0.0f);
                    }
        }
    }
}

static int gate_up_tasks(const struct job *j) { return j->up ? (j->up->rows + j->gate_rows - 1) / j->gate_rows : 0; }

static void run_task(void *job, int task, int worker) {
    struct job *j = job;
    const int first = gate_up_tasks(j);
    if (task < first)
        gate_up_task(j, task, worker);
    else
        down_task(j, task - first);
}

/* Memory of the blocks that feed a weight, from `at` on; returns the end. With at = 0 only that is asked for. */
static size_t place_blocks(const struct job *j, const struct weight *w, struct block *blocks, uint8_t *base, size_t at) {
    const size_t groups = (size_t)w->cols / (w->kind == KIND_BF16 ? 32 : w->group);
    const size_t value = w->kind == KIND_BF16 || w->kind == KIND_FP8 || j->precision == ACTIVATIONS_FLOAT ? 4 : 1;
    for (int b = 0; b < j->blocks; b++) {
        int tokens = 1;
        while (tokens < valid_tokens(j, b)) tokens *= 2;
        const size_t data = ((size_t)w->cols * value * tokens + 63) / 64 * 64, scale = (groups * 4 * tokens + 63) / 64 * 64;
        if (base)
            blocks[b] = (struct block){tokens, base + at, (float *)(base + at + data), base + at + data + scale};
        at += data + 2 * scale;
    }
    return at;
}

static int run(struct pool *pool, struct job *j, const float *x) {
    const int T = j->k->max_block;
    const struct weight *in = j->up ? j->up : j->down;
    const int kind = j->down->kind, octets = kind == KIND_INT8 || kind == KIND_INT8_GROUPS || kind == KIND_FP8;
    const int per_two = kind == KIND_BF16 ? 1 : octets ? 2 : 4;
    const size_t tile_bytes = (size_t)j->down->cols * TILE / per_two;
    if (j->tokens < 1 || j->tokens > MAX_TOKENS) return 1;
    j->blocks = (j->tokens + T - 1) / T;
    j->down_tiles = 2 * (int)(TASK_BYTES / (4 * tile_bytes) + 1);
    j->worker_floats = 0;
    if (j->up) { /* whole groups of the second weight's activations */
        const int unit = j->down->kind == KIND_BF16 ? 32 : j->down->group;
        j->gate_rows = (GATE_ROWS + unit - 1) / unit * unit;
        j->worker_floats = (size_t)2 * j->gate_rows * j->tokens + 16;
    }
    pool_lock(pool);
    size_t end = place_blocks(j, in, j->x, NULL, 0);
    if (j->up) end = place_blocks(j, j->down, j->h, NULL, end);
    uint8_t *memory = pool_scratch(pool, end + j->worker_floats * 4 * pool_threads(pool));
    if (memory) {
        size_t at = place_blocks(j, in, j->x, memory, 0);
        if (j->up)
            place_blocks(j, j->down, j->h, memory, at);
        else
            memcpy(j->h, j->x, j->blocks * sizeof *j->x);
        j->scratch = (float *)(memory + end);
        for (int b = 0; b < j->blocks; b++)
            j->k->pack(in, j->precision, x + (size_t)b * T * in->cols, in->cols, valid_tokens(j, b), 0, in->cols, &j->x[b]);
        const int first = gate_up_tasks(j), tiles = j->down->rows / TILE;
        pool_run(pool, run_task, j, first, first + (tiles + j->down_tiles - 1) / j->down_tiles);
    }
    pool_unlock(pool);
    return memory ? 0 : 2;
}

/* out = down(glu(gate(x), up(x))): x float [tokens][gate.cols], out float [tokens][down.rows]. 0, 1 for a number of tokens
 * outside 1 .. 64, 2 if memory ran out. The caller has checked shapes and that gate and up have one format. */
EXPORT int offmoe_expert(struct pool *pool, const struct kernels *k, const struct weight *gate, const struct weight *up,
                  const struct weight *down, int precision, int glu, float limit, float alpha, const float *x, int tokens,
                  float *out) {
    struct job j; /* its blocks stay unset until `run` places them */
    j.k = k, j.gate = gate, j.up = up, j.down = down;
    j.precision = precision, j.glu = glu, j.limit = limit, j.alpha = alpha, j.tokens = tokens, j.out = out;
    return run(pool, &j, x);
}

/* out = x w^T + bias: x float [tokens][cols], out float [tokens][rows]. Returns as offmoe_expert. */
EXPORT int offmoe_linear(struct pool *pool, const struct kernels *k, const struct weight *w, int precision, const float *x,
                  int tokens, float *out) {
    struct job j;
    j.k = k, j.gate = j.up = NULL, j.down = w;
    j.precision = precision, j.tokens = tokens, j.out = out;
    return run(pool, &j, x);
}

struct reading {
    const struct kernels *k;
    const uint8_t *p;
    size_t nbytes;
    uint64_t sums[1024];
};

static void read_task(void *job, int task, int worker) {
    struct reading *r = job;
    const size_t start = (size_t)task * TASK_BYTES;
    r->sums[worker % 1024] ^= r->k->read(r->p + start, start + TASK_BYTES < r->nbytes ? TASK_BYTES : r->nbytes - start);
}

/* Read `nbytes` of memory with all threads: what bounds every kernel here. The result means nothing. */
EXPORT uint64_t offmoe_read(struct pool *pool, const struct kernels *k, const uint8_t *p, size_t nbytes) {
    struct reading r = {k, p, nbytes, {0}};
    uint64_t sum = 0;
    pool_lock(pool);
    pool_run(pool, read_task, &r, 0, (int)((nbytes + TASK_BYTES - 1) / TASK_BYTES));
    pool_unlock(pool);
    for (int i = 0; i < 1024; i++) sum ^= r.sums[i];
    return sum;
}

#if defined(__x86_64__)
/* Leaf 7.1, which __builtin_cpu_supports of older compilers does not read. */
static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

/* Variant i of those that this processor runs, slowest first; null past the last. */
EXPORT const struct kernels *offmoe_variant(int i) {
    const struct kernels *all[5];
    int n = 0;
    all[n++] = &kernels_portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* who has both has f16c too */
    const int avx512 = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    (void)avx512;
#ifdef OFFMOE_HAS_AVX2
    if (avx2) all[n++] = &kernels_avx2;
#endif
#ifdef OFFMOE_HAS_AVXVNNI
    if (avx2 && has_avxvnni()) all[n++] = &kernels_avxvnni;
#endif
#ifdef OFFMOE_HAS_VNNI256
    if (avx512) all[n++] = &kernels_vnni256;
#endif
#ifdef OFFMOE_HAS_AVX512VNNI
    if (avx512) all[n++] = &kernels_avx512vnni;
#endif
#endif
    return i < n ? all[i] : NULL;
}

EXPORT const char *offmoe_variant_name(const struct kernels *k) { return k->name; }

/* The digest of the sources this was built from (build.py). */
EXPORT const char *offmoe_sources(void) { return OFFMOE_SOURCES; }
