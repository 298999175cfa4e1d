/* One GGUF matrix decoded, its blocks divided among the threads: what is called from Python.
 *
 * What moves: the blocks once in, the matrix once out. No value depends on another block or on the thread that took it.
 */
#include <string.h>

#include "offmoe.h"

enum { TASK_BYTES = 1 << 16 };

struct job {
    decode_function *decode;
    const struct decoding *d;
    int task_blocks;
};

static void decode_task(void *job, int task, int worker) {
    const struct job *j = job;
    const int first = task * j->task_blocks, end = first + j->task_blocks;
    (void)worker;
    j->decode(j->d, first, end < j->d->count ? end : j->d->count);
}

/* The caller has checked type, sizes and memory. */
EXPORT void offmoe_decode(struct pool *pool, const struct kernels *k, const struct decoding *d) {
    struct job j = {decoder_of(k), d, TASK_BYTES / d->block_bytes + 1};
    pool_lock(pool);
    pool_run(pool, decode_task, &j, 0, (d->count + j.task_blocks - 1) / j.task_blocks);
    pool_unlock(pool);
}
