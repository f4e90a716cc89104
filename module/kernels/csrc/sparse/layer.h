/* What one layer is told, and the memory of one thread. Layouts: sparse.h. */
#ifndef SPARSE_LAYER_H
#define SPARSE_LAYER_H

#include <time.h>

#include "sparse.h"

/* Kinds of layers: convolution of an image, of spikes; neurons alone; max-pool of spikes, of values (with the neurons
 * after it); self-attention; mean over the pixels of an image. */
enum { IMAGE, CONVOLVE, FIRE, POOL_SPIKES, POOL_VALUES, ATTEND, MEAN };

/* Parts of a layer whose time is taken where SPARSE_PROFILE is defined. */
enum { PREPARE, ADD, FINISH, PARTS };

enum { RESULTS = 3 }; /* of a layer at most: q, k and v are computed from one input */

/* Where a tensor begins, in bytes from the memory of the run; NONE where there is none. */
typedef int64_t place;
enum { NONE = -1 };

/* What is done with the sums of a convolution, [T*N*H*W, O] in all. */
typedef struct {
    const float *weights; /* packed */
    const float *bias;    /* [O] or null */
    place residual;       /* floats, added to the sums */
    place values;         /* the sums, of `dtype` */
    place spikes;         /* bits: of neurons that the sums drive over T steps */
    float decay, threshold;
} result;

/* As module/sparse/program.py has it. */
typedef struct {
    int32_t kind, taps, dtype, results;
    int64_t frames;           /* IMAGE: how many steps it has, T or 1 for the same image at each */
    int64_t T, N, H, W, C, O; /* of the input; O channels of each result */
    place input;              /* bits; floats, channels last, for IMAGE, FIRE, POOL_VALUES and MEAN */
    place keys, queries;      /* bits of the attention's other two inputs */
    int64_t source;           /* the layer that made the input bits and counted its spikes; NONE: there are `spikes` */
    int64_t spikes;
    result to[RESULTS];
} layer;

typedef struct {
    int64_t spikes;    /* fired by this layer; in ATTEND, left of q */
    int64_t additions; /* of weights, for all results; bias and residual not counted */
    double seconds;    /* of the whole layer */
    double parts[PARTS]; /* over all threads */
} outcome;

/* The memory of one thread for one layer. Lists are of `channel * lanes`, the offset of a row in a panel. */
typedef struct {
    uint64_t *halo;    /* 3x3: bits of the block at each step, with zeros around */
    int32_t *position; /* of each pixel in `halo`, or in the bits where there is none */
    float *sums;       /* [T][pixels][lanes] */
    float *table;
    uint32_t *begin;   /* [T][positions][words + 1]: where the channels of a word begin */
    uint32_t *channel; /* [T][positions * C] */
    uint32_t *joined;  /* by chunk of weights and pixel: (tap * C + c) * lanes */
    uint32_t *end;     /* [chunks][T * pixels + 1]: where the joined lists end */
    float *image;      /* IMAGE: of the block at each step, with zeros around: [T][positions][C] */
    double spent[PARTS], mark;
} scratch;

enum { TABLE_FLOATS = 6 * 1024 }; /* 24 KiB: stays in the first-level cache */

static inline double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* sums += weights of the active inputs, for one panel. Lists are prepared once per block before. */
void lists_prepare(const plan *s, const block *b, int64_t T, const uint64_t *bits, scratch *m);
void lists_add(const plan *s, const block *b, int64_t T, const float *weights, scratch *m);
void tables_add(const plan *s, const block *b, int64_t T, const uint64_t *bits, const float *weights, scratch *m);

void run_image(const layer *l, char *memory, outcome *done, scratch *m, int threads);
void run_convolve(const layer *l, char *memory, double rate, outcome *done, scratch *m, int threads);
void run_fire(const layer *l, char *memory, outcome *done);
void run_pool_spikes(const layer *l, char *memory, outcome *done);
void run_pool_values(const layer *l, char *memory, outcome *done);
void run_attend(const layer *l, char *memory, outcome *done, scratch *m);
void run_mean(const layer *l, char *memory);

enum {
    PIXELS = 512, /* of a block over all its steps: more read the weights less often, and need longer lists */
    SHARES = 4,   /* blocks per thread at least, where the layer has so many pixels */
};

/* How a convolution is cut into blocks. */
static inline plan plan_of(const layer *l, int threads) {
    const int64_t fair = l->N * l->H * l->W / (SHARES * threads), pixels = PIXELS / l->T < fair ? PIXELS / l->T : fair;
    return make_plan(l->N, l->H, l->W, l->C, l->O, l->taps, lanes_of(l->O), pixels < 16 ? 16 : pixels);
}

static inline void *at(char *memory, place where) {
    return where == NONE ? 0 : (void *)((uintptr_t)memory + (uintptr_t)where);
}

/* Adds to the outcome of a layer what one thread did; every thread comes here, and goes on when all have. */
static inline void count(outcome *done, int64_t spikes, int64_t additions) {
#pragma omp atomic
    done->spikes += spikes;
#pragma omp atomic
    done->additions += additions;
#pragma omp barrier
}

#endif
