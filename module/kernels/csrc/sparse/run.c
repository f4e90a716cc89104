/* A network, or one layer, in one call: its layers one after the other, with all threads at each. Layouts: sparse.h. */
#include "layer.h"

/* The memory that one thread needs for a layer; laid out at `memory` unless that is null. */
static size_t carve(const layer *l, char *memory, scratch *m, int threads) {
    size_t used = 0;
#define TAKE(name, type, n)                                                                                            \
    do {                                                                                                               \
        m->name = memory ? (type *)(memory + used) : 0;                                                                             \
        used += ((size_t)(n) * sizeof(type) + 63) / 64 * 64;                                                           \
    } while (0)
    if (l->kind == ATTEND) {
        TAKE(sums, float, (l->C + 63) / 64 * 128);
    } else if (l->kind == IMAGE || l->kind == CONVOLVE) {
        const plan s = plan_of(l, threads);
        const int64_t positions = l->T * s.images * s.height * s.width, pixels = l->T * s.images * s.rows * s.W;
        TAKE(sums, float, pixels * s.lanes);
        TAKE(image, float, positions * s.C);
        if (l->kind == CONVOLVE) {
            TAKE(halo, uint64_t, positions * s.words);
            TAKE(position, int32_t, pixels);
            TAKE(table, float, TABLE_FLOATS);
            TAKE(begin, uint32_t, positions * (s.words + 1));
            TAKE(channel, uint32_t, positions * s.C + 8);
            TAKE(joined, uint32_t, pixels * s.taps * s.C + 8);
            TAKE(end, uint32_t, s.taps * s.words * (pixels + 1));
        }
    }
#undef TAKE
    return used;
}

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
