/* The threads of one session. Whoever waits spins for some microseconds, since the next step is near, then sleeps on a
   condition variable, since the next run may be far. */

#include "model.h"

static void run_alone(uint32_t steps, bnnf__job job, bnnf__watch watch, void *context) {
    for (uint32_t i = 0; i < steps; i++) {
        job(context, i, 0, 0);
        watch(context, i);
    }
}

#ifdef BNNF_NO_THREADS

struct bnnf__pool {
    uint32_t steps;
    bnnf__job job;
    bnnf__watch watch;
    void *context;
};

int bnnf__parts(int threads) {
    (void)threads;
    return 1;
}

size_t bnnf__pool_bytes(int threads, uint32_t steps) {
    (void)threads, (void)steps;
    return sizeof(bnnf__pool);
}

bnnf__pool *bnnf__pool_start(void *memory, int threads, uint32_t steps, bnnf__job job, bnnf__watch watch,
                             void *context) {
    (void)threads;
    bnnf__pool *pool = memory;
    *pool = (bnnf__pool){steps, job, watch, context};
    return pool;
}

void bnnf__pool_run(bnnf__pool *pool) { run_alone(pool->steps, pool->job, pool->watch, pool->context); }

void bnnf__pool_stop(bnnf__pool *pool) { (void)pool; }

#else

#include <fenv.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define SPINS 2000
#define PARTS_OF_A_THREAD 2

typedef struct worker {
    bnnf__pool *pool;
    pthread_t thread;
    int number;
} worker;

/* Counted over all runs: in run r, from 1 on, the parts of a step are those from (r - 1) parts to r parts. So a thread
   that comes late, in a run that is over, finds that nothing is left of it. Differences count, since both wrap. */
typedef struct step {
    atomic_uint taken, done;
} step;

struct bnnf__pool {
    int threads, started;
    atomic_int stopping;
    unsigned parts;
    uint32_t steps;
    bnnf__job job;
    bnnf__watch watch;
    void *context;
    pthread_mutex_t mutex;
    pthread_cond_t awake;
    atomic_int sleepers;
    atomic_uint run;
    step *progress;   /* of each step, behind the workers */
    worker workers[]; /* threads - 1 */
};

int bnnf__parts(int threads) { return threads == 1 ? 1 : PARTS_OF_A_THREAD * threads; }

/* Has the counter come to `target`? */
static int reached(atomic_uint *counter, unsigned target) {
    return atomic_load(counter) - target < 0x80000000u;
}

/* Whoever sleeps has said so before he looks at the counter for the last time, and whoever changes a counter looks for
   sleepers afterwards: one of the two sees the other. */
static void wait_for(bnnf__pool *pool, atomic_uint *counter, unsigned target) {
    for (int i = 0; i < SPINS; i++) {
        if (reached(counter, target)) return;
        bnnf__relax();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!reached(counter, target)) pthread_cond_wait(&pool->awake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void wake(bnnf__pool *pool) {
    if (!atomic_load(&pool->sleepers)) return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->awake);
    pthread_mutex_unlock(&pool->mutex);
}

/* Takes a part of a step in run `run`; `parts` if none is left. */
static unsigned take(const bnnf__pool *pool, step *s, unsigned run) {
    const unsigned start = (run - 1) * pool->parts;
    unsigned next = atomic_load(&s->taken);
    while (next - start < pool->parts)
        if (atomic_compare_exchange_weak(&s->taken, &next, next + 1)) return next - start;
    return pool->parts;
}

static void run_steps(bnnf__pool *pool, unsigned run, int thread) {
    for (uint32_t i = 0; i < pool->steps; i++) {
        step *s = &pool->progress[i];
        const unsigned all = run * pool->parts;
        for (unsigned part; (part = take(pool, s, run)) < pool->parts;) {
            pool->job(pool->context, i, (int)part, thread);
            if (atomic_fetch_add(&s->done, 1) + 1 == all) wake(pool);
        }
        wait_for(pool, &s->done, all);
        if (!thread) pool->watch(pool->context, i);
    }
}

static void *work(void *argument) {
    worker *self = argument;
    bnnf__pool *pool = self->pool;
    fesetenv(FE_DFL_ENV);
    for (unsigned run = 0;;) {
        wait_for(pool, &pool->run, run + 1);
        run = atomic_load(&pool->run);
        if (atomic_load(&pool->stopping)) return NULL;
        run_steps(pool, run, self->number);
    }
}

void bnnf__pool_run(bnnf__pool *pool) {
    if (pool->threads == 1) {
        run_alone(pool->steps, pool->job, pool->watch, pool->context);
        return;
    }
    const unsigned run = atomic_fetch_add(&pool->run, 1) + 1;
    wake(pool);
    run_steps(pool, run, 0);
}

static size_t progress_at(int threads) {
    return bnnf__align(sizeof(bnnf__pool) + ((size_t)threads - 1) * sizeof(worker));
}

size_t bnnf__pool_bytes(int threads, uint32_t steps) {
    return progress_at(threads) + (threads == 1 ? 0 : steps * sizeof(step));
}

bnnf__pool *bnnf__pool_start(void *memory, int threads, uint32_t steps, bnnf__job job, bnnf__watch watch,
                             void *context) {
    bnnf__pool *pool = memory;
    memset(pool, 0, bnnf__pool_bytes(threads, steps));
    pool->threads = threads;
    pool->parts = (unsigned)bnnf__parts(threads);
    pool->steps = steps;
    pool->job = job;
    pool->watch = watch;
    pool->context = context;
    pool->progress = (step *)(void *)((char *)memory + progress_at(threads));
    if (threads == 1) return pool;
    if (pthread_mutex_init(&pool->mutex, NULL)) return NULL;
    if (pthread_cond_init(&pool->awake, NULL)) {
        pthread_mutex_destroy(&pool->mutex);
        return NULL;
    }
    for (; pool->started < threads - 1; pool->started++) {
        worker *w = &pool->workers[pool->started];
        *w = (worker){.pool = pool, .number = pool->started + 1};
        if (pthread_create(&w->thread, NULL, work, w)) {
            bnnf__pool_stop(pool);
            return NULL;
        }
    }
    return pool;
}

void bnnf__pool_stop(bnnf__pool *pool) {
    if (pool->threads == 1) return;
    atomic_store(&pool->stopping, 1);
    atomic_fetch_add(&pool->run, 1);
    wake(pool);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->awake);
    pthread_mutex_destroy(&pool->mutex);
}

#endif
