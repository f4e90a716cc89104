/* Additions from lists: the active inputs of each pixel are listed once, over all taps, and serve every panel. Legend and
 * layouts: sparse.h. */
#include "layer.h"

enum {
    CHUNK_FLOATS = 8 * 1024, /* of weights that one inner loop chooses from */
    CACHE_LINE = 64,         /* bytes; where lines are longer, some are fetched twice, which costs little */
};

typedef uint32_t eight __attribute__((vector_size(32), aligned(4), may_alias));

static uint32_t set_bits[256][8]; /* of each byte, from the lowest on */

__attribute__((constructor)) static void fill_set_bits(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int bit = 0, n = 0; bit < 8; bit++)
            if (byte >> bit & 1) set_bits[byte][n++] = (uint32_t)bit;
}

/* Lists (first + i) * lanes for each set bit i of the lowest `count` bytes; up to seven entries beyond the list are
 * overwritten. Its only branch is the count, the same for all: others a processor would guess wrong for each word. */
static inline uint32_t *list_word(uint64_t word, int64_t count, uint32_t first, uint32_t lanes, uint32_t *to) {
    const int shift = __builtin_ctz(lanes); /* a multiplication takes longer */
    eight offset = (eight){0} + (first << shift);
    for (int64_t i = 0; i < count; i++, word >>= 8, offset += lanes * 8) {
        *(eight *)to = (*(const eight *)set_bits[word & 255] << shift) + offset;
        to += __builtin_popcount((uint32_t)(word & 255));
    }
    return to;
}

/* Where the pixels that the taps see lie, from the pixel in their centre on. */
static void find_taps(const plan *s, int64_t *shift) {
    for (int tap = 0; tap < s->taps; tap++) shift[tap] = s->halo ? (tap / 3 - 1) * s->width + tap % 3 - 1 : 0;
}

/* Rows of weights that belong to a word of a tap. */
static int64_t rows_of(const plan *s) { return s->C < 64 ? s->C : 64; }

/* Words of the taps in a row whose weights an inner loop chooses from. */
static int64_t chunk_of(const plan *s) {
    const int64_t fitting = CHUNK_FLOATS / (s->lanes * rows_of(s));
    return fitting < 1 ? 1 : fitting;
}

/* Up to 64 channels: the bits of several taps fit into a word, in the order of the rows of weights. */
static uint32_t *join_bits(const plan *s, const block *b, int64_t T, int64_t first, int64_t last, const scratch *m,
                           const uint64_t *bits, uint32_t *to, uint32_t *end) {
    const int64_t together = 64 / s->C, step = s->halo ? s->images * s->height * s->width : s->N;
    const uint64_t *from = s->halo ? m->halo : bits + b->p0;
    int64_t shift[9];
    find_taps(s, shift);
    *end++ = (uint32_t)(to - m->joined);
    for (int64_t t = 0; t < T; t++)
        for (int64_t p = 0; p < b->pixels; p++) {
            const uint64_t *centre = from + t * step + m->position[p];
            for (int64_t tap = first; tap < last; tap += together) {
                uint64_t word = 0;
                const int64_t taps = last - tap < together ? last - tap : together;
                for (int64_t k = 0; k < taps; k++) word |= centre[shift[tap + k]] << k * s->C;
                to = list_word(word, (taps * s->C + 7) / 8, (uint32_t)(tap * s->C), (uint32_t)s->lanes, to);
            }
            *end++ = (uint32_t)(to - m->joined);
        }
    return to;
}

/* More channels: each pixel's are listed once, and copied for each tap. */
static void list_active(const plan *s, const block *b, int64_t T, const uint64_t *bits, scratch *m) {
    const int64_t positions = s->images * s->height * s->width, columns = s->words + 1;
    memset(m->begin, 0, (size_t)(T * positions * columns) * sizeof(uint32_t));
    for (int64_t t = 0; t < T; t++) {
        uint32_t *const channel = m->channel + t * positions * s->C, *to = channel;
        for (int64_t i = 0; i < b->images; i++)
            for (int64_t y = -s->halo; y < b->rows + s->halo; y++) {
                if (b->h0 + y < 0 || b->h0 + y >= s->H) continue;
                const uint64_t *row = bits + ((t * s->N + b->n0 + i) * s->H + b->h0 + y) * s->W * s->words;
                uint32_t *begin = m->begin + (t * positions + padded(s, i, y, 0)) * columns;
                for (int64_t x = 0; x < s->W; x++, *begin++ = (uint32_t)(to - channel))
                    for (int64_t w = 0; w < s->words; w++) {
                        *begin++ = (uint32_t)(to - channel);
                        to = list_word(*row++, s->C - 64 * w < 57 ? (s->C - 64 * w + 7) / 8 : 8, (uint32_t)(64 * w), (uint32_t)s->lanes, to);
                    }
            }
    }
}

/* The lists of the words first to last (without it) of all taps in a row, pixel by pixel; returns where they end. */
static uint32_t *join_lists(const plan *s, const block *b, int64_t T, int64_t first, int64_t last, const scratch *m,
                            uint32_t *to, uint32_t *end) {
    const int64_t positions = s->images * s->height * s->width, columns = s->words + 1;
    int64_t shift[9];
    find_taps(s, shift);
    *end++ = (uint32_t)(to - m->joined);
    for (int64_t t = 0; t < T; t++)
        for (int64_t p = 0; p < b->pixels; p++) {
            for (int64_t tap = first / s->words; tap * s->words < last; tap++) {
                const int64_t from = first > tap * s->words ? first - tap * s->words : 0;
                const int64_t until = last < (tap + 1) * s->words ? last - tap * s->words : s->words;
                const uint32_t *begin = m->begin + (t * positions + m->position[p] + shift[tap]) * columns;
                const uint32_t *list = m->channel + t * positions * s->C + begin[from], n = begin[until] - begin[from];
                for (uint32_t i = 0; i < n; i += 8) /* up to seven entries beyond, too */
                    *(eight *)(to + i) = *(const eight *)(list + i) + (uint32_t)(tap * s->C * s->lanes);
                to += n;
            }
            *end++ = (uint32_t)(to - m->joined);
        }
    return to;
}

void lists_prepare(const plan *s, const block *b, int64_t T, const uint64_t *bits, scratch *m) {
    const int64_t all = s->taps * s->words, chunk = chunk_of(s);
    uint32_t *to = m->joined, *end = m->end;
    if (s->words > 1) list_active(s, b, T, bits, m);
    for (int64_t first = 0; first < all; first += chunk, end += T * b->pixels + 1) {
        const int64_t last = first + chunk < all ? first + chunk : all;
        to = s->words > 1 ? join_lists(s, b, T, first, last, m, to, end)
                          : join_bits(s, b, T, first, last, m, bits, to, end);
    }
}

/* `next`: the weights of the chunk that follows, fetched into the second-level cache meanwhile. A list chooses rows in an
 * order that no processor foresees, and the weights of a panel may be larger than that cache. Beyond the end is no fault. */
INLINE void add_lists(const uint32_t *joined, const uint32_t *end, int64_t pixels, const float *weights, float *sums,
                      uintptr_t next, int64_t bytes, const int lanes) {
    const int64_t lines = (bytes / CACHE_LINE + pixels - 1) / pixels; /* for each list */
    for (int64_t p = 0; p < pixels; p++, sums += lanes) {
        for (int64_t i = 0; i < lines; i++, next += CACHE_LINE) __builtin_prefetch((const void *)next, 0, 2);
        add_rows(weights, joined + end[p], end[p + 1] - end[p], sums, lanes);
    }
}

void lists_add(const plan *s, const block *b, int64_t T, const float *weights, scratch *m) {
    const int64_t all = s->taps * s->words, chunk = chunk_of(s), bytes = chunk * rows_of(s) * s->lanes * 4;
    const uint32_t *end = m->end;
    uintptr_t next = (uintptr_t)weights;
    for (int64_t first = 0; first < all; first += chunk, end += T * b->pixels + 1) {
        next += (uintptr_t)bytes;
#define ADD_LISTS(LANES) add_lists(m->joined, end, T * b->pixels, weights, m->sums, next, bytes, LANES)
        WITH_LANES(s->lanes, ADD_LISTS)
    }
}
