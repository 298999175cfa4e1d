/* A few threads that share the tasks of one call at a time.
 *
 * Other processes may use the cores, and a thread can lose its core for milliseconds. So tasks are not assigned in
 * advance: a thread that has a core takes the next task, the caller works too, and the call waits only for threads that
 * hold a task. A thread without work spins for some microseconds, about the length of a task's tail, and then sleeps.
 * On busy cores, OpenMP's static split with spinning barriers is 5 times slower than one thread (docs/design/kernels.md).
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "offmoe.h"

enum { SPIN_NS = 30000, CLOSED = 0x7fffffff };

struct pool {
    int threads, alive;
    pthread_t *ids;
    struct seat *seats;
    pthread_mutex_t callers, sleep;
    pthread_cond_t wake;
    atomic_int sleepers, stop;
    /* Generation of the call << 32 | next task. A task is taken by compare-and-swap of both, so that a thread that slept
     * through the end of a call cannot take a task of the next with what it read of the last. */
    _Atomic uint64_t claim;
    atomic_int done, first, total;
    task_function *run;
    void *job;
    void *scratch;
    size_t scratch_bytes;
};

struct seat {
    struct pool *pool;
    int worker;
};

static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint32_t generation_of(uint64_t claim) { return (uint32_t)(claim >> 32); }

/* Whether what a thread of `generation` waits for has happened: `count` tasks are done, or the generation is over. */
static int happened(struct pool *p, uint32_t generation, int count) {
    return atomic_load(&p->stop) || generation_of(atomic_load(&p->claim)) != generation || atomic_load(&p->done) >= count;
}

static void wait_for(struct pool *p, uint32_t generation, int count) {
    const int64_t end = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (happened(p, generation, count)) return;
            pause_cpu();
        }
    } while (now_ns() < end);
    pthread_mutex_lock(&p->sleep);
    atomic_fetch_add(&p->sleepers, 1); /* before the check: who makes it true looks for sleepers afterwards */
    while (!happened(p, generation, count)) pthread_cond_wait(&p->wake, &p->sleep);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->sleep);
}

static void notify(struct pool *p) {
    if (!atomic_load(&p->sleepers)) return;
    pthread_mutex_lock(&p->sleep);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->sleep);
}

static void work(struct pool *p, int worker, uint32_t generation) {
    for (;;) {
        uint64_t claim = atomic_load(&p->claim);
        const int task = (int)(claim & CLOSED), first = atomic_load(&p->first), total = atomic_load(&p->total);
        if (generation_of(claim) != generation || task >= total) return;
        if (task >= first && atomic_load(&p->done) < first) {
            wait_for(p, generation, first);
            if (atomic_load(&p->stop)) return;
            continue;
        }
        if (!atomic_compare_exchange_strong(&p->claim, &claim, claim + 1)) continue;
        p->run(p->job, task, worker);
        const int done = atomic_fetch_add(&p->done, 1) + 1;
        if (done == first || done == total) notify(p);
    }
}

static void *worker_main(void *argument) {
    const struct seat *seat = argument;
    struct pool *p = seat->pool;
    uint32_t generation = 0;
    for (;;) {
        wait_for(p, generation, CLOSED);
        if (atomic_load(&p->stop)) return NULL;
        generation = generation_of(atomic_load(&p->claim));
        work(p, seat->worker, generation);
    }
}

void pool_run(struct pool *p, task_function *run, void *job, int first, int total) {
    const uint32_t generation = generation_of(atomic_load(&p->claim)) + 1;
    atomic_store(&p->claim, (uint64_t)generation << 32 | CLOSED); /* no task while the call is being described */
    p->run = run;
    p->job = job;
    atomic_store(&p->first, first);
    atomic_store(&p->total, total);
    atomic_store(&p->done, 0);
    atomic_store(&p->claim, (uint64_t)generation << 32);
    notify(p);
    work(p, 0, generation);
    wait_for(p, generation, total);
}

int pool_threads(const struct pool *p) { return p->threads; }
void pool_lock(struct pool *p) { pthread_mutex_lock(&p->callers); }
void pool_unlock(struct pool *p) { pthread_mutex_unlock(&p->callers); }

void *pool_scratch(struct pool *p, size_t nbytes) {
    if (nbytes > p->scratch_bytes) {
        void *larger = NULL;
        if (posix_memalign(&larger, 64, nbytes)) return NULL;
        free(p->scratch);
        p->scratch = larger;
        p->scratch_bytes = nbytes;
    }
    return p->scratch;
}

EXPORT void offmoe_pool_free(struct pool *p) {
    atomic_store(&p->stop, 1);
    pthread_mutex_lock(&p->sleep);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->sleep);
    for (int i = 0; i < p->alive; i++) pthread_join(p->ids[i], NULL);
    pthread_mutex_destroy(&p->callers);
    pthread_mutex_destroy(&p->sleep);
    pthread_cond_destroy(&p->wake);
    free(p->scratch);
    free(p->seats);
    free(p->ids);
    free(p);
}

/* A pool of `threads` threads, the caller among them; fewer if the system gives fewer. Null if memory ran out. */
EXPORT struct pool *offmoe_pool_new(int threads) {
    struct pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    pthread_mutex_init(&p->callers, NULL);
    pthread_mutex_init(&p->sleep, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->ids = calloc((size_t)threads, sizeof *p->ids);
    p->seats = calloc((size_t)threads, sizeof *p->seats);
    p->threads = 1;
    if (!p->ids || !p->seats) {
        offmoe_pool_free(p);
        return NULL;
    }
    for (int i = 0; i + 1 < threads; i++) {
        p->seats[i] = (struct seat){p, i + 1};
        if (pthread_create(&p->ids[i], NULL, worker_main, &p->seats[i])) break;
        p->alive++;
    }
    p->threads = p->alive + 1;
    return p;
}
