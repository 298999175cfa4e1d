/* Experts on a few tokens each, gate and up of one, or one weight: what is called from Python.
 *
 * What moves: every byte of each expert once per call of up to 64 rows. The first tasks each compute some rows of gate
 * and up of one expert for all its tokens, activate them and lay them out for the second weight; the last tasks compute
 * rows of down. All experts of a call share one description of the work, so threads are woken once, and wait once
 * between its two halves. No function keeps a pointer after it returned.
 */
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "offmoe.h"

enum { TASK_BYTES = 1 << 18, GATE_ROWS = 64 };
/* Bytes of a call's weights, times its tokens, that one thread computes before another would be awake: about 40 us, and
 * 50 us for a wake-up. */
enum { ALONE_BYTES = 1 << 20 };

/* One expert of a call; or one weight, which is `down` then; or gate and up on one token, whose product is the output. */
struct job {
    const struct weight *gate, *up, *down;
    int glu, tokens, blocks, gate_rows, down_tiles;
    int first_gate, first_down; /* tasks of gate and up, and of down, that earlier jobs have */
    float limit, alpha;
    const float *in;
    float *out;
    struct block *x, *h; /* activations of the first weight and of the second, or one block of inputs as multiply.c has
                            them; x may be the job's before */
    int shares_x;
};

struct call {
    const struct kernels *k;
    int precision, count, gate_tasks, down_tasks;
    float *scratch;
    size_t worker_floats;
    struct job jobs[MAX_TOKENS];
    struct block blocks[2 * MAX_TOKENS];
};

static int log2_of(int n) { return n == 1 ? 0 : n == 2 ? 1 : n == 4 ? 2 : 3; }
static int least(int a, int b) { return a < b ? a : b; }

/* Whether a weight is multiplied with all tokens of a job at once. */
static int is_many(const struct call *c, const struct job *j, const struct weight *w) {
    return w->kind == KIND_BF16 && c->k->many_tokens && j->tokens >= c->k->many_tokens;
}

/* Tokens of block b that are real; all blocks but the last are full. */
static int valid_tokens(const struct call *c, const struct job *j, int b) {
    return least(c->k->max_block, j->tokens - b * c->k->max_block);
}

/* Rows of gate and up of all tokens: gate and up float [tokens][rows]. */
static void gate_up_by_blocks(const struct call *c, const struct job *j, int start, int rows, float *gate, float *up) {
    const int T = c->k->max_block;
    float tile_y[2][TILE * MAX_BLOCK], *y[2] = {tile_y[0], tile_y[1]};
    const struct weight *both[2] = {j->gate, j->up};
    for (int tile = 0; tile < rows / TILE; tile++) {
        const int at = start / TILE + tile, tiles[2] = {at, at};
        for (int b = 0; b < j->blocks; b++) {
            c->k->pair[j->up->kind][c->precision][log2_of(j->x[b].tokens)](both, tiles, &j->x[b], y);
            for (int m = 0; m < valid_tokens(c, j, b); m++)
                for (int r = 0; r < TILE; r++) {
                    const size_t to = (size_t)(b * T + m) * rows + tile * TILE + r;
                    const int row = at * TILE + r;
                    gate[to] = y[0][m * TILE + r] + (j->gate->bias ? j->gate->bias[row] : 0.0f);
                    up[to] = y[1][m * TILE + r] + (j->up->bias ? j->up->bias[row] : 0.0f);
                }
        }
    }
}

/* Rows of a weight of all tokens at once, `stride` apart in out. */
static void rows_of_many(const struct call *c, const struct job *j, const struct weight *w, const struct block *x, int start,
                         int rows, float *sums, float *out, size_t stride) {
    product_of_tiles(c->k, w, start / TILE, rows / TILE, x->data, j->tokens, sums);
    for (int m = 0; m < j->tokens; m++)
        for (int i = 0; i < rows; i++)
            out[m * stride + i] = sums[((size_t)(i / TILE) * j->tokens + m) * TILE + i % TILE];
}

static void gate_up_task(const struct call *c, const struct job *j, int task, int worker) {
    const int start = task * j->gate_rows, rows = least(j->gate_rows, j->up->rows - start), T = c->k->max_block;
    float *gate = c->scratch + worker * c->worker_floats, *up = gate + (size_t)j->gate_rows * j->tokens;
    if (is_many(c, j, j->up)) {
        float *sums = up + (size_t)j->gate_rows * j->tokens;
        rows_of_many(c, j, j->gate, j->x, start, rows, sums, gate, rows);
        rows_of_many(c, j, j->up, j->x, start, rows, sums, up, rows);
    } else {
        gate_up_by_blocks(c, j, start, rows, gate, up);
    }
    c->k->activate(j->glu, j->limit, j->alpha, gate, up, (size_t)rows * j->tokens);
    if (!j->down)
        memcpy(j->out + start, gate, rows * sizeof *gate);
    else if (is_many(c, j, j->down))
        lay_out(j->down->cols, j->tokens, gate, rows, start, rows, j->h->data);
    else
        for (int b = 0; b < j->blocks; b++)
            c->k->pack(j->down, c->precision, gate + (size_t)b * T * rows, rows, valid_tokens(c, j, b), start, rows, &j->h[b]);
}

/* Tiles are computed by twos. Both of them are read side by side, so each is the one behind the tile that was read
 * there before: then its beginning has been prefetched. Rows of bf16 are read one tile after the other. */
static void down_task(const struct call *c, const struct job *j, int task, int worker) {
    const int tiles = j->down->rows / TILE, start = task * j->down_tiles, end = least(start + j->down_tiles, tiles);
    const int T = c->k->max_block, kind = j->down->kind, twos = (end - start) / 2, stride = kind == KIND_BF16 ? 1 : twos;
    float tile_y[2][TILE * MAX_BLOCK], *y[2] = {tile_y[0], tile_y[1]};
    const struct weight *both[2] = {j->down, j->down};
    if (is_many(c, j, j->down)) {
        float *sums = c->scratch + worker * c->worker_floats;
        rows_of_many(c, j, j->down, j->h, start * TILE, (end - start) * TILE, sums, j->out + start * TILE, j->down->rows);
        return;
    }
    for (int i = 0; i < (end - start + 1) / 2; i++) {
        const int pair = i < twos, tile = !pair ? end - 1 : start + (kind == KIND_BF16 ? 2 * i : i);
        const int two[2] = {tile, tile + stride};
        for (int b = 0; b < j->blocks; b++) {
            const int size = log2_of(j->h[b].tokens);
            if (pair)
                c->k->pair[kind][c->precision][size](both, two, &j->h[b], y);
            else
                c->k->tile[kind][c->precision][size](j->down, tile, &j->h[b], y[0]);
            for (int t = 0; t <= pair; t++)
                for (int m = 0; m < valid_tokens(c, j, b); m++)
                    for (int r = 0; r < TILE; r++) {
                        const int row = two[t] * TILE + r;
                        j->out[(size_t)(b * T + m) * j->down->rows + row] =
                            y[t][m * TILE + r] + (j->down->bias ? j->down->bias[row] : 0.0f);
                    }
        }
    }
}

static void run_task(void *call, int task, int worker) {
    const struct call *c = call;
    const int of_gate = task < c->gate_tasks;
    if (!of_gate) task -= c->gate_tasks;
    int low = 0; /* the last job that begins at this task or before it */
    for (int high = c->count; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (task < (of_gate ? c->jobs[middle].first_gate : c->jobs[middle].first_down))
            high = middle;
        else
            low = middle;
    }
    const struct job *j = &c->jobs[low];
    if (of_gate)
        gate_up_task(c, j, task - j->first_gate, worker);
    else
        down_task(c, j, task - j->first_down, worker);
}

/* Memory of the blocks that feed a weight, from `at` on; returns the end. Without a base only that is asked for. */
static size_t place_blocks(const struct call *c, const struct job *j, const struct weight *w, struct block *blocks,
                           uint8_t *base, size_t at) {
    const size_t groups = (size_t)w->cols / (w->kind == KIND_BF16 ? 32 : w->group);
    const size_t value = w->kind == KIND_BF16 || w->kind == KIND_FP8 || c->precision == ACTIVATIONS_FLOAT ? 4 : 1;
    if (is_many(c, j, w)) {
        if (base) blocks[0] = (struct block){j->tokens, base + at, NULL, NULL};
        return at + ((size_t)w->cols * j->tokens * sizeof(float) + 63) / 64 * 64;
    }
    for (int b = 0; b < j->blocks; b++) {
        int tokens = 1;
        while (tokens < valid_tokens(c, j, b)) tokens *= 2;
        const size_t data = ((size_t)w->cols * value * tokens + 63) / 64 * 64, scale = (groups * 4 * tokens + 63) / 64 * 64;
        if (base)
            blocks[b] = (struct block){tokens, base + at, (float *)(base + at + data), base + at + data + scale};
        at += data + 2 * scale;
    }
    return at;
}

static const struct weight *first_of(const struct job *j) { return j->up ? j->up : j->down; }

static size_t place(const struct call *c, uint8_t *base) {
    size_t at = 0;
    for (int i = 0; i < c->count; i++) {
        const struct job *j = &c->jobs[i];
        if (!j->shares_x) at = place_blocks(c, j, first_of(j), j->x, base, at);
        if (j->up && j->down) at = place_blocks(c, j, j->down, j->h, base, at);
    }
    return at;
}

/* Whether the first weights of two jobs read the same activations in one form: then these are laid out once. */
static int same_input(const struct job *a, const struct job *b) {
    const struct weight *u = first_of(a), *v = first_of(b);
    const int same_form = !u->zeros == !v->zeros && !u->minima == !v->minima;
    return a->in == b->in && a->tokens == b->tokens && u->kind == v->kind && u->group == v->group && same_form;
}

/* Let each thread have so many floats. */
static void reserve(struct call *c, size_t floats) {
    floats = (floats + 15) / 16 * 16;
    if (floats > c->worker_floats) c->worker_floats = floats;
}

/* Tasks of gate and up: rows that are whole groups of the second weight's activations. Without one they may be any tiles. */
static void add_gate_up(struct call *c, struct job *j) {
    const struct weight *w = j->down ? j->down : j->up;
    const int unit = w->kind == KIND_BF16 ? 32 : w->group;
    j->gate_rows = (GATE_ROWS + unit - 1) / unit * unit;
    c->gate_tasks += (j->up->rows + j->gate_rows - 1) / j->gate_rows;
    reserve(c, (size_t)2 * j->gate_rows * j->tokens + (is_many(c, j, j->up) ? product_floats(j->gate_rows / TILE, j->tokens) : 0));
}

static void add_down(struct call *c, struct job *j) {
    const int kind = j->down->kind, octets = kind == KIND_INT8 || kind == KIND_INT8_GROUPS || kind == KIND_FP8;
    const int per_two = kind == KIND_BF16 ? 1 : octets ? 2 : 4, tiles = j->down->rows / TILE;
    const size_t tile_bytes = (size_t)j->down->cols * TILE / per_two;
    j->down_tiles = 2 * (int)(TASK_BYTES / (4 * tile_bytes) + 1);
    c->down_tasks += (tiles + j->down_tiles - 1) / j->down_tiles;
    if (is_many(c, j, j->down)) reserve(c, product_floats(least(j->down_tiles, tiles), j->tokens));
}

/* Add a job, whose weights, input and output are set. */
static void add(struct call *c, struct block **blocks, int tokens) {
    struct job *j = &c->jobs[c->count];
    j->tokens = tokens;
    j->blocks = (tokens + c->k->max_block - 1) / c->k->max_block;
    j->shares_x = c->count && same_input(j, j - 1);
    j->x = j->shares_x ? (j - 1)->x : *blocks;
    if (!j->shares_x) *blocks += j->blocks;
    j->h = j->up ? *blocks : j->x;
    if (j->up && j->down) *blocks += j->blocks;
    j->first_gate = c->gate_tasks;
    j->first_down = c->down_tasks;
    if (j->up) add_gate_up(c, j);
    if (j->down) add_down(c, j);
    c->count++;
}

/* Whether one thread is enough for a call. */
static int is_small(const struct call *c) {
    const struct job *j = c->jobs;
    const struct weight *w = first_of(j);
    const size_t values = (size_t)w->rows * w->cols * (!j->up ? 1 : j->down ? 3 : 2);
    const size_t bytes = w->kind == KIND_BF16 ? values * 2 : values; /* of other kinds at most */
    return c->count == 1 && bytes * (size_t)j->tokens <= ALONE_BYTES;
}

static int run(struct pool *pool, struct call *c) {
    pool_lock(pool);
    const size_t end = place(c, NULL);
    uint8_t *memory = pool_scratch(pool, end + c->worker_floats * 4 * pool_threads(pool));
    if (memory) {
        place(c, memory);
        c->scratch = (float *)(memory + end);
        for (int i = 0; i < c->count; i++) {
            const struct job *j = &c->jobs[i];
            const struct weight *in = first_of(j);
            if (j->shares_x) continue;
            if (is_many(c, j, in)) {
                lay_out(in->cols, j->tokens, j->in, in->cols, 0, in->cols, j->x->data);
                continue;
            }
            for (int b = 0; b < j->blocks; b++)
                c->k->pack(in, c->precision, j->in + (size_t)b * c->k->max_block * in->cols, in->cols, valid_tokens(c, j, b),
                           0, in->cols, &j->x[b]);
        }
        const int tasks = c->gate_tasks + c->down_tasks;
        if (is_small(c))
            for (int task = 0; task < tasks; task++) run_task(c, task, 0);
        else
            pool_run(pool, run_task, c, c->gate_tasks, tasks);
    }
    pool_unlock(pool);
    return memory ? 0 : 2;
}

static void begin(struct call *c, const struct kernels *k, int precision) {
    c->k = k, c->precision = precision; /* jobs and blocks stay unset until they are added and placed */
    c->count = c->gate_tasks = c->down_tasks = 0;
    c->worker_floats = 0;
}

/* out = down(glu(gate(x), up(x))) of `count` experts: x float [rows][gate.cols], out float [rows][down.rows], the rows of
 * one expert behind those of the other, rows[i] of expert i. rows null: x is one row, which every expert gets. 0, 1 for
 * numbers outside 1 .. 64, 2 if memory ran out. The caller has checked shapes, that they are those of all experts, and
 * that gate and up have one format. */
EXPORT int offmoe_experts(struct pool *pool, const struct kernels *k, const struct expert *const *experts, const int32_t *rows,
                   int count, int precision, const float *x, float *out) {
    struct call c;
    struct block *blocks = c.blocks;
    int before = 0;
    if (count < 1 || count > MAX_TOKENS) return 1;
    begin(&c, k, precision);
    for (int i = 0; i < count; i++) {
        const struct expert *e = experts[i];
        const int tokens = rows ? rows[i] : 1;
        if (tokens < 1 || tokens > MAX_TOKENS - before) return 1;
        struct job *j = &c.jobs[i];
        j->gate = &e->gate, j->up = &e->up, j->down = &e->down;
        j->glu = e->glu, j->limit = e->limit, j->alpha = e->alpha;
        j->in = x + (rows ? (size_t)before * e->gate.cols : 0);
        j->out = out + (size_t)before * e->down.rows;
        add(&c, &blocks, tokens);
        before += tokens;
    }
    return run(pool, &c);
}

/* h float [up.rows] = glu(gate(x), up(x)) of one expert on one token, x float [up.cols]: what offmoe_linear takes through
 * down. Returns as offmoe_experts. */
EXPORT int offmoe_gate_up(struct pool *pool, const struct kernels *k, const struct expert *e, int precision, const float *x,
                          float *h) {
    struct call c;
    struct block *blocks = c.blocks;
    begin(&c, k, precision);
    struct job *j = c.jobs;
    j->gate = &e->gate, j->up = &e->up, j->down = NULL;
    j->glu = e->glu, j->limit = e->limit, j->alpha = e->alpha;
    j->in = x, j->out = h;
    add(&c, &blocks, 1);
    return run(pool, &c);
}

int linears(struct pool *pool, const struct kernels *k, const struct weight *const *w, int count, int precision,
            const float *x, int tokens, float *const *out) {
    struct call c;
    struct block *blocks = c.blocks;
    if (tokens < 1 || tokens * count > MAX_TOKENS) return 1;
    begin(&c, k, precision);
    for (int i = 0; i < count; i++) {
        c.jobs[i].gate = c.jobs[i].up = NULL, c.jobs[i].down = w[i];
        c.jobs[i].in = x, c.jobs[i].out = out[i];
        add(&c, &blocks, tokens);
    }
    return run(pool, &c);
}

/* out = x w^T + bias: x float [tokens][cols], out float [tokens][rows]. Returns as offmoe_experts. */
EXPORT int offmoe_linear(struct pool *pool, const struct kernels *k, const struct weight *w, int precision, const float *x,
                  int tokens, float *out) {
    return linears(pool, k, &w, 1, precision, x, tokens, &out);
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
/* A bit of leaf 7.1, which __builtin_cpu_supports of older compilers does not read. */
enum { AVX_VNNI = 1 << 4, AVX512_BF16 = 1 << 5 };
static int has(unsigned bit) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit) != 0;
}
#endif

/* From how many tokens on bf16 weights are faster by offmoe_multiply; 0: never. */
EXPORT int offmoe_many_tokens(const struct kernels *k) { return k->many_tokens; }

decode_function *decoder_of(const struct kernels *k) {
#if defined(OFFMOE_HAS_AVX512VNNI) && defined(OFFMOE_HAS_DECODE_AVX512BF16)
    static int known; /* 1 + whether it has it: a virtual machine is left for every cpuid */
    int has_bf16 = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!has_bf16) __atomic_store_n(&known, has_bf16 = 1 + has(AVX512_BF16), __ATOMIC_RELAXED);
    if (k == &kernels_avx512vnni && has_bf16 == 2) return decode_avx512bf16;
#endif
    return k->decode;
}

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
    if (avx2 && has(AVX_VNNI)) all[n++] = &kernels_avxvnni;
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
