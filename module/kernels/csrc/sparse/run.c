/* A network, or one layer, in one call: its layers one after the other, with all threads at each. Layouts: sparse.h. */
#include "layer.h"

static void run(const layer *l, char *memory, double rate, outcome *done, scratch *m, int threads) {
    switch (l->kind) {
    case IMAGE: run_image(l, memory, done, m, threads); break;
    case CONVOLVE: run_convolve(l, memory, rate, done, m, threads); break;
    case FIRE: run_fire(l, memory, done); break;
    case POOL_SPIKES: run_pool_spikes(l, memory, done); break;
    case POOL_VALUES: run_pool_values(l, memory, done); break;
    case ATTEND: run_attend(l, memory, done, m); break;
    default: run_mean(l, memory);
    }
}

/* Runs n layers; `done`, one for each, is overwritten. Returns 0 or ERROR_MEMORY. */
int64_t sparse_run(const layer *layers, int64_t n, char *memory, outcome *done, int threads) {
    size_t needed = 0;
    int failed = 0;
    memset(done, 0, (size_t)n * sizeof(outcome));
    for (int64_t i = 0; i < n; i++) {
        scratch m;
        const size_t bytes = carve(layers + i, 0, &m, threads);
        needed = bytes > needed ? bytes : needed;
    }
#pragma omp parallel num_threads(threads)
    {
        char *own = malloc(needed + 64), *aligned = own + (64 - (uintptr_t)own % 64);
        if (!own)
#pragma omp atomic write
            failed = 1;
#pragma omp barrier
        double started = now();
        for (int64_t i = 0; i < n && !failed; i++) {
            const layer *l = layers + i;
            scratch m = {0};
            carve(l, aligned, &m, threads);
            const double spikes = (double)(l->source == NONE ? l->spikes : done[l->source].spikes);
            run(l, memory, spikes / (double)(l->T * l->N * l->H * l->W * l->C), done + i, &m, threads);
#pragma omp master
            {
                const double ended = now();
                done[i].seconds = ended - started;
                started = ended;
            }
        }
        free(own);
    }
    return failed ? ERROR_MEMORY : 0;
}
