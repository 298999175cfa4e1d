/* One GGUF matrix decoded, its blocks divided among the threads, or put into tiles: what is called from Python.
 *
 * What moves: the blocks once in, the matrix once out. No value depends on another block or on the thread that took it.
 */
#include <string.h>

#include "offmoe.h"

enum { TASK_BYTES = 1 << 16 };

struct job {
    const struct kernels *k;
    const struct decoding *d;
    int task_blocks;
};

static void decode_task(void *job, int task, int worker) {
    const struct job *j = job;
    const int first = task * j->task_blocks, end = first + j->task_blocks;
    (void)worker;
    j->k->decode(j->d, first, end < j->d->count ? end : j->d->count);
}

/* The caller has checked type, sizes and memory. */
EXPORT void offmoe_decode(struct pool *pool, const struct kernels *k, const struct decoding *d) {
    struct job j = {k, d, TASK_BYTES / d->block_bytes + 1};
    pool_lock(pool);
    pool_run(pool, decode_task, &j, 0, (d->count + j.task_blocks - 1) / j.task_blocks);
    pool_unlock(pool);
}

/* The low halves of eight bytes, one behind the other. */
static inline uint32_t low_halves(uint64_t x) {
    x &= 0x0f0f0f0f0f0f0f0f;
    x = (x | x >> 4) & 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return (uint32_t)(x | x >> 16);
}

/* The four words of a block: 16 bytes whose low halves are inputs 0 .. 15 and whose high halves are inputs 16 .. 31. */
static inline void put_words(const uint8_t *octets, uint32_t *words) {
    for (int half = 0; half < 2; half++) {
        uint64_t x;
        memcpy(&x, octets + 8 * half, 8);
        words[half * TILE] = low_halves(x);
        words[(half + 2) * TILE] = low_halves(x >> 4);
    }
}

static inline void retile(const struct retiling *r, const int block_bytes, const int scale_bytes) {
    const size_t per_row = r->blocks_per_row, row_bytes = per_row * block_bytes;
    for (size_t tile = 0; tile < (size_t)r->rows / TILE; tile++)
        for (size_t k = 0; k < per_row; k++)
            for (size_t i = 0; i < TILE; i++) {
                const uint8_t *block = r->blocks + (tile * TILE + i) * row_bytes + k * block_bytes;
                const size_t at = tile * per_row + k;
                memcpy((uint8_t *)r->scales + (at * TILE + i) * scale_bytes, block, scale_bytes);
                put_words(block + scale_bytes, r->words + at * 4 * TILE + i);
            }
}

/* Runs in the calling thread. The caller has checked type, sizes and memory. */
EXPORT void offmoe_retile(const struct retiling *r) {
    if (r->type == 39)
        retile(r, 17, 1);
    else
        retile(r, 18, 2);
}
