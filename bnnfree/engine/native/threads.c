/* A small pool of threads for one session. Whoever waits spins for some microseconds, since the next op is near, then
   sleeps on a condition variable, since the next run may be far. */

#include <stdlib.h>

#include "model.h"

#ifdef BNNF_NO_THREADS

struct bnnf__pool {
    bnnf__job job;
    void *context;
};

bnnf__pool *bnnf__pool_create(int threads, bnnf__job job, void *context) {
    (void)threads;
    bnnf__pool *pool = malloc(sizeof *pool);
    if (pool) *pool = (bnnf__pool){job, context};
    return pool;
}

void bnnf__pool_run(bnnf__pool *pool) { pool->job(pool->context, 0); }

void bnnf__pool_barrier(bnnf__pool *pool) { (void)pool; }

void bnnf__pool_free(bnnf__pool *pool) { free(pool); }

#else

#include <pthread.h>
#include <stdatomic.h>

#define SPINS 2000

typedef struct worker {
    bnnf__pool *pool;
    pthread_t thread;
    int part;
} worker;

struct bnnf__pool {
    int threads, started, stopping;
    bnnf__job job;
    void *context;
    pthread_mutex_t mutex;
    pthread_cond_t awake;
    int sleepers;
    atomic_int arrived;  /* at the barrier of this phase */
    atomic_uint phase;   /* barriers passed; changes with the mutex held, so that no sleeper misses it */
    worker *workers;
};

static void sleep_until_past(bnnf__pool *pool, unsigned phase) {
    pthread_mutex_lock(&pool->mutex);
    while (atomic_load(&pool->phase) == phase) {
        pool->sleepers++;
        pthread_cond_wait(&pool->awake, &pool->mutex);
        pool->sleepers--;
    }
    pthread_mutex_unlock(&pool->mutex);
}

void bnnf__pool_barrier(bnnf__pool *pool) {
    if (pool->threads == 1) return;
    unsigned phase = atomic_load(&pool->phase);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 == pool->threads) {
        atomic_store(&pool->arrived, 0);
        pthread_mutex_lock(&pool->mutex);
        atomic_store(&pool->phase, phase + 1);
        if (pool->sleepers) pthread_cond_broadcast(&pool->awake);
        pthread_mutex_unlock(&pool->mutex);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&pool->phase) != phase) return;
        bnnf__relax();
    }
    sleep_until_past(pool, phase);
}

static void *work(void *argument) {
    worker *self = argument;
    bnnf__pool *pool = self->pool;
    for (;;) {
        bnnf__pool_barrier(pool); /* a run begins */
        if (pool->stopping) return NULL;
        pool->job(pool->context, self->part);
        bnnf__pool_barrier(pool); /* it ends */
    }
}

void bnnf__pool_run(bnnf__pool *pool) {
    bnnf__pool_barrier(pool);
    pool->job(pool->context, 0);
    bnnf__pool_barrier(pool);
}

bnnf__pool *bnnf__pool_create(int threads, bnnf__job job, void *context) {
    bnnf__pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->threads = threads;
    pool->job = job;
    pool->context = context;
    if (threads == 1) return pool;
    pool->workers = calloc((size_t)threads - 1, sizeof *pool->workers);
    if (!pool->workers || pthread_mutex_init(&pool->mutex, NULL)) {
        free(pool->workers);
        free(pool);
        return NULL;
    }
    if (pthread_cond_init(&pool->awake, NULL)) {
        pthread_mutex_destroy(&pool->mutex);
        free(pool->workers);
        free(pool);
        return NULL;
    }
    for (; pool->started < threads - 1; pool->started++) {
        worker *w = &pool->workers[pool->started];
        *w = (worker){.pool = pool, .part = pool->started + 1};
        if (pthread_create(&w->thread, NULL, work, w)) {
            bnnf__pool_free(pool);
            return NULL;
        }
    }
    return pool;
}

/* Of workers that could not all be started, those that were are waiting for the others: the barrier is told of them
   as if they had come. */
void bnnf__pool_free(bnnf__pool *pool) {
    if (!pool) return;
    if (pool->threads > 1) {
        pool->stopping = 1;
        atomic_fetch_add(&pool->arrived, pool->threads - 1 - pool->started);
        bnnf__pool_barrier(pool);
        for (int i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
        pthread_cond_destroy(&pool->awake);
        pthread_mutex_destroy(&pool->mutex);
        free(pool->workers);
    }
    free(pool);
}

#endif
