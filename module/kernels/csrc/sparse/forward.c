/* Convolutions forward, with the neurons on top where some follow: of spikes, and the first one, of an image. Legend and
 * layouts: sparse.h.
 *
 * A block of pixels, at all T steps, is taken through one panel after the other, so that the sums and the potentials of the
 * neurons never leave the cache.
 */
#include "layer.h"

/* Whether tables are faster than lists for the share `rate` of active inputs. Nanoseconds per pixel and thread as measured on
 * AVX2 with layers of 2-64 and 2-512; on every machine the same choice, so that no result depends on a timing. */
static int tables_are_faster(const layer *l, const plan *s, double rate) {
    const double inputs = (double)(s->taps * s->C), panels = (double)((s->O + PANEL - 1) / PANEL * l->results);
    const double vectors = (double)((s->O + 7) / 8 * l->results); /* of eight sums */
    const double lists = 0.22 * inputs + panels * 8 + 0.25 * rate * inputs * vectors; /* making, starting, adding */
    const double tables = 0.36 * s->taps * (double)((s->C + 3) / 4) * vectors;
    return tables < lists;
}

static inline uint16_t to_bf16(float value) { /* round to nearest even, as torch does; NaN stays NaN */
    uint32_t u;
    memcpy(&u, &value, 4);
    return (u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : (uint16_t)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

/* What the sums of one panel of a block start from. */
static void start_sums(const layer *l, const result *to, const plan *s, const block *b, int64_t steps, int64_t o0,
                       const float *residual, float *sums) {
    const int64_t n = s->O - o0 < s->lanes ? s->O - o0 : s->lanes, step = l->N * l->H * l->W;
    float bias[PANEL] = {0};
    if (to->bias) memcpy(bias, to->bias + o0, (size_t)n * sizeof(float));
    for (int64_t t = 0; t < steps; t++)
        for (int64_t p = 0; p < b->pixels; p++, sums += s->lanes) {
            memcpy(sums, bias, (size_t)s->lanes * sizeof(float));
            if (!residual) continue;
            const float *row = residual + (t * step + b->p0 + p) * s->O + o0;
            if (n == PANEL) /* a constant count, for the vectoriser */
                for (int64_t j = 0; j < PANEL; j++) sums[j] += row[j];
            else
                for (int64_t j = 0; j < n; j++) sums[j] += row[j];
        }
}

static void keep_values(const layer *l, const plan *s, const block *b, int64_t o0, void *values, const float *sums) {
    const int64_t n = s->O - o0 < s->lanes ? s->O - o0 : s->lanes, step = l->N * l->H * l->W;
    for (int64_t t = 0; t < l->T; t++)
        for (int64_t p = 0; p < b->pixels; p++, sums += s->lanes) {
            const int64_t to = (t * step + b->p0 + p) * s->O + o0;
            if (l->dtype == DTYPE_F32) {
                memcpy((float *)values + to, sums, (size_t)n * sizeof(float));
            } else {
                for (int64_t j = 0; j < n; j++) ((uint16_t *)values)[to + j] = to_bf16(sums[j]);
            }
        }
}

/* The neurons of one panel of a block, on sums that lie `between` floats apart from step to step; returns how many fired.
 * Of the two halves of a word each panel writes its own part. */
INLINE int64_t fire(const layer *l, const result *to, const block *b, int64_t o0, int64_t between, uint32_t *spikes,
                    int64_t halves, const float *sums, const int lanes) {
    const int64_t step = l->N * l->H * l->W;
    const int last = o0 + lanes >= l->O && o0 / PANEL % 2 == 0; /* the other half of the word has no panel */
    int64_t fired = 0;
    for (int64_t p = 0; p < b->pixels; p++) {
        vec v[PANEL / VEC];
        for (int j = 0; j < lanes / VEC; j++) v[j] = (vec){0};
        for (int64_t t = 0; t < l->T; t++) {
            ivec fires[PANEL / VEC];
            for (int j = 0; j < lanes / VEC; j++)
                fires[j] = lif(AT(sums + t * between + p * lanes + j * VEC), v + j, to->decay, to->threshold);
            const uint32_t set = bits_of(fires, lanes / VEC);
            uint32_t *word = spikes + (t * step + b->p0 + p) * halves + o0 / PANEL;
            word[0] = set;
            if (last) word[1] = 0;
            fired += __builtin_popcount(set);
        }
    }
    return fired;
}

static int64_t finish(const layer *l, const result *to, const plan *s, const block *b, int64_t o0, int64_t between,
                      char *memory, const float *sums) {
    int64_t fired = 0;
    if (to->values != NONE) keep_values(l, s, b, o0, at(memory, to->values), sums);
    if (to->spikes != NONE) {
        uint32_t *spikes = at(memory, to->spikes);
        const int64_t halves = (s->O + 63) / 64 * 2;
#define FIRE_LANES(LANES) fired = fire(l, to, b, o0, between, spikes, halves, sums, LANES)
        WITH_LANES(s->lanes, FIRE_LANES)
    }
    return fired;
}

/* (spike, tap) pairs of a block, without taps beyond the border of the map. */
static int64_t pairs_of(const plan *s, const block *b, int64_t T, const uint64_t *bits) {
    int64_t pairs = 0;
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < b->images; i++)
            for (int64_t y = -s->halo; y < b->rows + s->halo; y++) {
                if (b->h0 + y < 0 || b->h0 + y >= s->H) continue;
                const uint64_t *row = bits + ((t * s->N + b->n0 + i) * s->H + b->h0 + y) * s->W * s->words;
                const int64_t rows = s->halo ? (y > 0) + (y >= 0 && y < b->rows) + (y + 1 < b->rows) : 1;
                int64_t spikes = 0, edge = 0;
                for (int64_t w = 0; w < s->W * s->words; w++) spikes += __builtin_popcountll(row[w]);
                for (int64_t w = 0; w < s->words && s->halo; w++)
                    edge += __builtin_popcountll(row[w]) + __builtin_popcountll(row[(s->W - 1) * s->words + w]);
                pairs += rows * (s->halo ? 3 * spikes - edge : spikes);
            }
    return pairs;
}

/* The time since the last mark belongs to `part` (PARTS: to none). */
static inline void mark(scratch *m, int part) {
#ifdef SPARSE_PROFILE
    const double time = now();
    if (part < PARTS) m->spent[part] += time - m->mark;
    m->mark = time;
#else
    (void)m, (void)part;
#endif
}

/* Where each pixel of a block is, and for 3x3 its bits with zeros around. */
static void prepare(const plan *s, const block *b, int64_t T, const uint64_t *bits, scratch *m) {
    const int64_t positions = s->images * s->height * s->width, image = s->H * s->W, words = s->words;
    for (int64_t i = 0, p = 0; i < b->images; i++)
        for (int64_t y = 0; y < b->rows; y++)
            for (int64_t x = 0; x < s->W; x++, p++) m->position[p] = (int32_t)padded(s, i, y, x);
    if (!s->halo) return;
    memset(m->halo, 0, (size_t)(T * positions * words) * sizeof(uint64_t));
    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < b->images; i++)
            for (int64_t y = -1; y <= b->rows; y++) {
                if (b->h0 + y < 0 || b->h0 + y >= s->H) continue;
                memcpy(m->halo + (t * positions + padded(s, i, y, 0)) * words,
                       bits + ((t * s->N + b->n0 + i) * image + (b->h0 + y) * s->W) * words,
                       (size_t)(s->W * words) * sizeof(uint64_t));
            }
}

/* All threads come here; `rate` is the share of the input that fires. */
void run_convolve(const layer *l, char *memory, double rate, outcome *done, scratch *m, int threads) {
    const plan s = plan_of(l, threads);
    const uint64_t *bits = at(memory, l->input);
    const int tables = tables_are_faster(l, &s, rate);
    int64_t pairs = 0, spikes = 0;
#pragma omp for schedule(dynamic) nowait
    for (int64_t index = 0; index < s.blocks; index++) {
        const block b = block_at(&s, index);
        mark(m, PARTS);
        prepare(&s, &b, l->T, bits, m);
        if (!tables) lists_prepare(&s, &b, l->T, bits, m);
        pairs += pairs_of(&s, &b, l->T, bits);
        mark(m, PREPARE);
        for (int r = 0; r < l->results; r++)
            for (int64_t o0 = 0; o0 < s.O; o0 += s.lanes) {
                const result *to = l->to + r;
                const float *weights = to->weights + o0 * s.taps * s.C;
                start_sums(l, to, &s, &b, l->T, o0, at(memory, to->residual), m->sums);
                if (tables) tables_add(&s, &b, l->T, bits, weights, m);
                else lists_add(&s, &b, l->T, weights, m);
                mark(m, ADD);
                spikes += finish(l, to, &s, &b, o0, b.pixels * s.lanes, memory, m->sums);
                mark(m, FINISH);
            }
    }
    for (int part = 0; part < PARTS; part++)
#pragma omp atomic
        done->parts[part] += m->spent[part];
    count(done, spikes, pairs * l->O * l->results);
}

/* The image [H, W, C] of a block with zeros around: [positions][C]. */
static void copy_image(const plan *s, const block *b, const float *x, float *to) {
    memset(to, 0, (size_t)(s->images * s->height * s->width * s->C) * sizeof(float));
    for (int64_t i = 0; i < b->images; i++)
        for (int64_t y = -1; y <= b->rows; y++) {
            if (b->h0 + y < 0 || b->h0 + y >= s->H) continue;
            memcpy(to + padded(s, i, y, 0) * s->C, x + ((b->n0 + i) * s->H + b->h0 + y) * s->W * s->C,
                   (size_t)(s->W * s->C) * sizeof(float));
        }
}

INLINE void multiply(const plan *s, const block *b, const float *image, const float *weights, float *sums,
                     const int lanes) {
    for (int64_t i = 0; i < b->images; i++)
        for (int64_t y = 0; y < b->rows; y++)
            for (int64_t x = 0; x < s->W; x++, sums += lanes) {
                const float *w = weights;
                vec a[PANEL / VEC];
                for (int j = 0; j < lanes / VEC; j++) a[j] = AT(sums + j * VEC);
                for (int v = -1; v <= 1; v++) {
                    const float *from = image + padded(s, i, y + v, x - 1) * s->C;
                    for (int64_t k = 0; k < 3 * s->C; k++, w += lanes)
                        for (int j = 0; j < lanes / VEC; j++) a[j] += from[k] * AT(w + j * VEC);
                }
                for (int j = 0; j < lanes / VEC; j++) AT(sums + j * VEC) = a[j];
            }
}

/* The first layer. An image that is the same at each step is convolved once. */
void run_image(const layer *l, char *memory, outcome *done, scratch *m, int threads) {
    const plan s = plan_of(l, threads);
    const result *to = l->to;
    const float *x = at(memory, l->input);
    const int64_t step = s.images * s.height * s.width * s.C;
    int64_t spikes = 0;
#pragma omp for schedule(dynamic) nowait
    for (int64_t index = 0; index < s.blocks; index++) {
        const block b = block_at(&s, index);
        const int64_t sums = b.pixels * s.lanes; /* of one step */
        for (int64_t t = 0; t < l->frames; t++)
            copy_image(&s, &b, x + t * s.N * s.H * s.W * s.C, m->image + t * step);
        for (int64_t o0 = 0; o0 < s.O; o0 += s.lanes) {
            start_sums(l, to, &s, &b, l->frames, o0, 0, m->sums);
            for (int64_t t = 0; t < l->frames; t++) {
#define MULTIPLY(LANES) multiply(&s, &b, m->image + t * step, to->weights + o0 * 9 * s.C, m->sums + t * sums, LANES)
                WITH_LANES(s.lanes, MULTIPLY)
            }
            spikes += finish(l, to, &s, &b, o0, l->frames == 1 ? 0 : sums, memory, m->sums);
        }
    }
    count(done, spikes, 0);
}
