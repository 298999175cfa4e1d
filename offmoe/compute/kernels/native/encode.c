/* One weight through the encoder, or compared with what it became, its rows divided among the threads: what is called from Python.
 *
 * What moves: the weight once in, its words, scales and zero points once out. No function keeps a pointer after it
 * returned, and no row depends on another or on the thread that took it.
 */
#include <stdatomic.h>

#include "offmoe.h"

enum { TASK_VALUES = 1 << 16 };

struct job {
    const struct kernels *k;
    const struct encoding *e;
    float *memory;
    int task_rows;
    atomic_int wrong;
};

static void encode_task(void *job, int task, int worker) {
    struct job *j = job;
    const int end = (task + 1) * j->task_rows < j->e->rows ? (task + 1) * j->task_rows : j->e->rows;
    for (int row = task * j->task_rows; row < end && !atomic_load(&j->wrong); row++)
        if (j->k->encode(j->e, row, j->memory + (size_t)worker * j->e->cols)) atomic_store(&j->wrong, 1);
}

/* 0, 2 if memory ran out, 3 if the weight holds what is not finite. The caller has checked shapes. */
EXPORT int offmoe_encode(struct pool *pool, const struct kernels *k, const struct encoding *e) {
    struct job j = {k, e, NULL, TASK_VALUES / e->cols + 1, 0};
    pool_lock(pool);
    j.memory = pool_scratch(pool, (size_t)pool_threads(pool) * e->cols * sizeof(float));
    if (j.memory) pool_run(pool, encode_task, &j, 0, (e->rows + j.task_rows - 1) / j.task_rows);
    pool_unlock(pool);
    return !j.memory ? 2 : atomic_load(&j.wrong) ? 3 : 0;
}

struct comparison {
    const struct kernels *k;
    const struct encoded *e;
    int task_rows;
};

static void compare_task(void *job, int task, int worker) {
    struct comparison *j = job;
    const int end = (task + 1) * j->task_rows < j->e->rows ? (task + 1) * j->task_rows : j->e->rows;
    (void)worker;
    for (int row = task * j->task_rows; row < end; row++) j->k->compare(j->e, row);
}

/* Fill in e->out. The caller has checked shapes. */
EXPORT void offmoe_compare(struct pool *pool, const struct kernels *k, const struct encoded *e) {
    struct comparison j = {k, e, TASK_VALUES / e->cols + 1};
    pool_lock(pool);
    pool_run(pool, compare_task, &j, 0, (e->rows + j.task_rows - 1) / j.task_rows);
    pool_unlock(pool);
}
