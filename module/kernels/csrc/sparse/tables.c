/* Additions from tables: the 16 possible sums of the weights of four neighbouring inputs, made once for a block of pixels,
 * then one addition for any four inputs. Legend and layouts: sparse.h.
 *
 * The time does not depend on the firing rate, and there are no lists whose lengths a processor would have to guess.
 */
#include "layer.h"

typedef uint16_t quarter __attribute__((may_alias)); /* of a word: 16 channels */

/* Of four channels each, in a quarter. */
static int nibbles_of(int64_t C) { return C <= 8 ? 2 : 4; }

/* Of `count` channels (fewer: no weights beyond) the sums over each set of four: [nibbles][16][lanes]. */
INLINE void make_table(const float *weights, int64_t count, int nibbles, float *table, const int lanes) {
    for (int g = 0; g < nibbles; g++, table += 16 * lanes)
        for (int j = 0; j < lanes; j += VEC) {
            vec w[4], sums[16] = {{0}};
            for (int k = 0; k < 4; k++)
                w[k] = 4 * g + k < count ? AT(weights + (4 * g + k) * lanes + j) : (vec){0};
            AT(table + j) = sums[0];
#pragma GCC unroll 15
            for (int set = 1; set < 16; set++) {
                sums[set] = sums[set & (set - 1)] + w[__builtin_ctz(set)];
                AT(table + set * lanes + j) = sums[set];
            }
        }
}

/* sums[pixel] += the rows of the tables that the bits of the sources choose; two chains, so that additions overlap. */
INLINE void look_up(const uint64_t *bits, const int32_t *position, int64_t pixels, int64_t words,
                    const int32_t *source, int sources, const float *table, float *sums, const int nibbles,
                    const int lanes) {
    for (int64_t p = 0; p < pixels; p++, sums += lanes) {
        const quarter *from = (const quarter *)(bits + position[p] * words);
        const float *rows = table;
        vec a[PANEL / VEC], b[PANEL / VEC];
        for (int j = 0; j < lanes / VEC; j++) a[j] = AT(sums + j * VEC), b[j] = (vec){0};
        for (int i = 0; i < sources; i++) {
            uint32_t left = from[source[i]];
#pragma GCC unroll 2
            for (int g = 0; g < nibbles; g += 2, left >>= 8, rows += 32 * lanes) {
                const float *u = rows + (left & 15) * lanes, *w = rows + (16 + (left >> 4 & 15)) * lanes;
                for (int j = 0; j < lanes / VEC; j++) a[j] += AT(u + j * VEC), b[j] += AT(w + j * VEC);
            }
        }
        for (int j = 0; j < lanes / VEC; j++) AT(sums + j * VEC) = a[j] + b[j];
    }
}

INLINE void add_chunk(const plan *s, const block *b, int64_t T, const uint64_t *bits, const float *weights, scratch *m,
                      int first, int last, const int nibbles, const int lanes) {
    const int64_t quarters = (s->C + 15) / 16, step = s->halo ? s->images * s->height * s->width : s->N;
    int32_t source[16];
    for (int i = first; i < last; i++) {
        const int64_t tap = i / quarters, c = i % quarters * 16;
        const int64_t shift = s->halo ? (tap / 3 - 1) * s->width + tap % 3 - 1 : 0;
        source[i - first] = (int32_t)(shift * s->words * 4 + i % quarters);
        make_table(weights + (tap * s->C + c) * lanes, s->C - c, nibbles, m->table + (i - first) * nibbles * 16 * lanes,
                   lanes);
    }
    const uint64_t *from = s->halo ? m->halo : bits + b->p0 * s->words;
    for (int64_t t = 0; t < T; t++)
        look_up(from + t * step * s->words, m->position, b->pixels, s->words, source, last - first, m->table,
                m->sums + t * b->pixels * lanes, nibbles, lanes);
}

void tables_add(const plan *s, const block *b, int64_t T, const uint64_t *bits, const float *weights, scratch *m) {
    const int nibbles = nibbles_of(s->C), all = (int)(s->taps * ((s->C + 15) / 16));
    int chunk = TABLE_FLOATS / (nibbles * 16 * s->lanes);
    chunk = chunk > 16 ? 16 : chunk;
    for (int i = 0; i < all; i += chunk) {
        const int last = i + chunk < all ? i + chunk : all;
#define ADD_CHUNK(LANES)                                                                                               \
    (nibbles == 2 ? add_chunk(s, b, T, bits, weights, m, i, last, 2, LANES)                                            \
                  : add_chunk(s, b, T, bits, weights, m, i, last, 4, LANES))
        WITH_LANES(s->lanes, ADD_CHUNK)
    }
}
